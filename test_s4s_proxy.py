"""Tests of s4s_proxy.py, over real sockets. Run: python -m unittest"""
from __future__ import annotations

import base64
import datetime
import json
import re
import unittest
from collections.abc import Iterator
from typing import Any

import s4s_proxy as s4s


class PublishedVectors(unittest.TestCase):
    """Examples that the texts themselves give."""

    def test_the_s256_challenge_of_rfc_7636_appendix_b(self) -> None:
        self.assertEqual(s4s.s256_challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
                         "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM")


# What each version asks for, or S4S's apps do: type, element, and what it is in DSTU2, STU3 and R4 (None: it is not
# there). A dotted path takes the first of a list.
ELEMENTS: tuple[tuple[str, str, Any, Any, Any], ...] = (
    ("AllergyIntolerance", "patient", dict, dict, dict),
    ("AllergyIntolerance", "substance", dict, None, None),
    ("AllergyIntolerance", "code", None, dict, dict),
    ("AllergyIntolerance", "status", str, None, None),
    ("AllergyIntolerance", "clinicalStatus", None, str, dict),
    ("AllergyIntolerance", "verificationStatus", None, str, dict),
    ("AllergyIntolerance", "recordedDate", str, None, str),
    ("AllergyIntolerance", "assertedDate", None, str, None),
    ("Binary", "contentType", str, str, str),
    ("Binary", "content", str, str, None),
    ("Binary", "data", None, None, str),
    ("Condition", "patient", dict, None, None),
    ("Condition", "subject", None, dict, dict),
    ("Condition", "code", dict, dict, dict),
    ("Condition", "category", dict, list, list),
    ("Condition", "clinicalStatus", str, str, dict),
    ("Condition", "verificationStatus", str, str, dict),
    ("Condition", "onsetDateTime", str, str, str),
    ("Condition", "dateRecorded", str, None, None),
    ("Coverage", "status", None, str, str),
    ("Coverage", "beneficiary", None, dict, dict),
    ("Coverage", "payor", None, list, list),
    ("Coverage", "type", None, dict, dict),
    ("Coverage", "period", None, dict, dict),
    ("Coverage", "class", None, None, list),
    ("DiagnosticReport", "status", str, str, str),
    ("DiagnosticReport", "category", dict, dict, list),
    ("DiagnosticReport", "code", dict, dict, dict),
    ("DiagnosticReport", "subject", dict, dict, dict),
    ("DiagnosticReport", "effectiveDateTime", str, str, str),
    ("DiagnosticReport", "issued", str, str, str),
    ("DiagnosticReport", "performer", dict, list, list),
    ("DiagnosticReport", "result.reference", str, str, str),
    ("DocumentReference", "masterIdentifier", dict, dict, dict),
    ("DocumentReference", "identifier", list, list, list),
    ("DocumentReference", "subject", dict, dict, dict),
    ("DocumentReference", "status", str, str, str),
    ("DocumentReference", "type", dict, dict, dict),
    ("DocumentReference", "category", None, None, list),
    ("DocumentReference", "date", None, None, str),
    ("DocumentReference", "indexed", str, str, None),
    ("DocumentReference", "created", str, str, None),
    ("DocumentReference", "context.encounter", dict, dict, list),
    ("DocumentReference", "content.format", list, dict, dict),
    ("DocumentReference", "content.attachment.contentType", str, str, str),
    ("DocumentReference", "content.attachment.url", str, str, str),
    ("Encounter", "status", str, str, str),
    ("Encounter", "class", str, dict, dict),
    ("Encounter", "type", list, list, list),
    ("Encounter", "patient", dict, None, None),
    ("Encounter", "subject", None, dict, dict),
    ("Encounter", "period.start", str, str, str),
    ("Endpoint", "address", None, str, str),
    ("ExplanationOfBenefit", "status", None, str, str),
    ("ExplanationOfBenefit", "patient", None, dict, dict),
    ("ExplanationOfBenefit", "type", None, dict, dict),
    ("ExplanationOfBenefit", "created", None, str, str),
    ("ExplanationOfBenefit", "insurer", None, dict, dict),
    ("ExplanationOfBenefit", "provider", None, dict, dict),
    ("ExplanationOfBenefit", "use", None, None, str),
    ("ExplanationOfBenefit", "outcome", None, dict, str),
    ("ExplanationOfBenefit", "insurance", None, dict, list),
    ("ExplanationOfBenefit", "item.service", None, dict, None),
    ("ExplanationOfBenefit", "item.productOrService", None, None, dict),
    ("ExplanationOfBenefit", "item.net.system", None, str, None),
    ("ExplanationOfBenefit", "totalCost", None, dict, None),
    ("ExplanationOfBenefit", "totalBenefit", None, dict, None),
    ("ExplanationOfBenefit", "total", None, None, list),
    ("ImagingStudy", "uid", str, str, None),
    ("ImagingStudy", "identifier", None, None, list),
    ("ImagingStudy", "status", None, None, str),
    ("ImagingStudy", "availability", str, str, None),
    ("ImagingStudy", "patient", dict, dict, None),
    ("ImagingStudy", "subject", None, None, dict),
    ("ImagingStudy", "started", str, str, str),
    ("ImagingStudy", "numberOfSeries", int, int, int),
    ("ImagingStudy", "numberOfInstances", int, int, int),
    ("ImagingStudy", "endpoint", None, list, list),
    ("ImagingStudy", "series.uid", str, str, str),
    ("ImagingStudy", "series.modality", dict, dict, dict),
    ("Immunization", "status", str, str, str),
    ("Immunization", "vaccineCode", dict, dict, dict),
    ("Immunization", "patient", dict, dict, dict),
    ("Immunization", "date", str, str, None),
    ("Immunization", "occurrenceDateTime", None, None, str),
    ("Immunization", "wasNotGiven", bool, None, None),
    ("Immunization", "reported", bool, None, None),
    ("Immunization", "notGiven", None, bool, None),
    ("Immunization", "primarySource", None, bool, bool),
    ("MedicationAdministration", "status", str, str, str),
    ("MedicationAdministration", "patient", dict, None, None),
    ("MedicationAdministration", "subject", None, dict, dict),
    ("MedicationAdministration", "effectiveTimeDateTime", str, None, None),
    ("MedicationAdministration", "effectiveDateTime", None, str, str),
    ("MedicationAdministration", "medicationCodeableConcept", dict, dict, dict),
    ("MedicationAdministration", "prescription", dict, dict, None),
    ("MedicationAdministration", "request", None, None, dict),
    ("MedicationAdministration", "dosage.quantity", dict, None, None),
    ("MedicationAdministration", "dosage.dose", None, dict, dict),
    ("MedicationDispense", "status", str, str, str),
    ("MedicationDispense", "patient", dict, None, None),
    ("MedicationDispense", "subject", None, dict, dict),
    ("MedicationDispense", "medicationCodeableConcept", dict, dict, dict),
    ("MedicationDispense", "authorizingPrescription", list, list, list),
    ("MedicationDispense", "whenHandedOver", str, str, str),
    ("MedicationOrder", "status", str, None, None),
    ("MedicationOrder", "dateWritten", str, None, None),
    ("MedicationOrder", "patient", dict, None, None),
    ("MedicationOrder", "prescriber", dict, None, None),
    ("MedicationOrder", "medicationCodeableConcept", dict, None, None),
    ("MedicationOrder", "dosageInstruction.doseQuantity", dict, None, None),
    ("MedicationOrder", "dosageInstruction.timing.repeat.periodUnits", str, None, None),
    ("MedicationRequest", "status", None, str, str),
    ("MedicationRequest", "intent", None, str, str),
    ("MedicationRequest", "subject", None, dict, dict),
    ("MedicationRequest", "authoredOn", None, str, str),
    ("MedicationRequest", "requester.agent", None, dict, None),
    ("MedicationRequest", "requester.reference", None, None, str),
    ("MedicationRequest", "medicationCodeableConcept", None, dict, dict),
    ("MedicationRequest", "dosageInstruction.doseQuantity", None, dict, None),
    ("MedicationRequest", "dosageInstruction.doseAndRate", None, None, list),
    ("MedicationRequest", "dosageInstruction.timing.repeat.periodUnit", None, str, str),
    ("MedicationStatement", "status", str, str, str),
    ("MedicationStatement", "patient", dict, None, None),
    ("MedicationStatement", "subject", None, dict, dict),
    ("MedicationStatement", "effectivePeriod", dict, dict, dict),
    ("MedicationStatement", "medicationCodeableConcept", dict, dict, dict),
    ("MedicationStatement", "taken", None, str, None),
    ("MedicationStatement", "basedOn", None, list, list),
    ("Observation", "status", str, str, str),
    ("Observation", "category", dict, list, list),
    ("Observation", "code", dict, dict, dict),
    ("Observation", "subject", dict, dict, dict),
    ("Observation", "effectiveDateTime", str, str, str),
    ("Organization", "name", str, str, str),
    ("Organization", "type", dict, list, list),
    ("Patient", "name.family", list, str, str),
    ("Patient", "name.given", list, list, list),
    ("Patient", "identifier.system", str, str, str),
    ("Patient", "identifier.value", str, str, str),
    ("Patient", "gender", str, str, str),
    ("Patient", "birthDate", str, str, str),
    ("Patient", "address", list, list, list),
    ("Patient", "telecom", list, list, list),
    ("Patient", "communication.language", dict, dict, dict),
    ("Practitioner", "name", dict, list, list),
    ("Procedure", "status", str, str, str),
    ("Procedure", "subject", dict, dict, dict),
    ("Procedure", "code", dict, dict, dict),
    ("Procedure", "performedDateTime", str, str, str),
    ("Procedure", "encounter", dict, None, dict),
    ("Procedure", "context", None, dict, None),
    ("RelatedPerson", "patient", dict, dict, dict),
    ("RelatedPerson", "name", dict, list, list),
    ("RelatedPerson", "relationship", dict, dict, list),
)


def at(value: Any, path: str) -> Any:
    """What is at a dotted path, of lists in the first; None if nothing."""
    *outer, last = path.split(".")
    for name in outer:
        value = value.get(name, {})
        value = value[0] if isinstance(value, list) else value
    return value.get(last)


def walk(value: Any) -> Iterator[Any]:
    """A value and all that is in it."""
    yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


def luhn(digits: str) -> int:
    """The sum that LOINC's check digit brings to a multiple of ten."""
    return sum(sum(divmod(int(digit) * (1 + place % 2), 10)) for place, digit in enumerate(reversed(digits)))


def verhoeff(digits: str) -> int:
    """The sum that SNOMED CT's check digit brings to 0: steps in the group of a pentagon's turns and flips."""
    order, total = "1576283094", 0
    for place, letter in enumerate(reversed(digits)):
        digit = int(letter)
        for _ in range(place % 8):
            digit = int(order[digit])
        turn = digit % 5 if total < 5 else -digit % 5 if digit < 5 else -(digit % 5)
        total = (total % 5 + turn) % 5 + 5 * ((total < 5) != (digit < 5))
    return total


class SampleRecords(unittest.TestCase):
    """The three patients' records, in each version of FHIR."""

    records: dict[str, list[dict[str, Any]]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.records = {version: list(s4s.sample_resources(version)) for version in ("dstu2", "stu3", "r4")}

    def of_patient(self, version: str, patient: str) -> list[dict[str, Any]]:
        """What refers to a patient as its owner, and the patient."""
        return [one for one in self.records[version] if one["id"] == patient or f"Patient/{patient}" in (
            at(one, f"{name}.reference") for name in ("subject", "patient", "beneficiary"))]

    def names(self, resources: list[dict[str, Any]]) -> set[str]:
        """The types of resources; an Observation goes by its category."""
        return {json.dumps(one["category"]).split('"code": "')[1].split('"')[0]
                if one["resourceType"] == "Observation" else one["resourceType"] for one in resources}

    def test_daniel_has_every_class_that_apps_ask_for(self) -> None:
        common = {"Patient", "social-history", "laboratory", "vital-signs", "Condition", "MedicationStatement",
                  "MedicationDispense", "MedicationAdministration", "AllergyIntolerance", "Procedure", "Immunization",
                  "DocumentReference", "Encounter", "ImagingStudy", "DiagnosticReport"}
        later = {"MedicationRequest", "Coverage", "ExplanationOfBenefit"}
        self.assertEqual(self.names(self.of_patient("dstu2", "smart-1288992")), common | {"MedicationOrder"})
        self.assertEqual(self.names(self.of_patient("stu3", "smart-1288992")), common | later)
        self.assertEqual(self.names(self.of_patient("r4", "smart-1288992")), common | later)

    def test_amy_and_joseph_have_the_classes_promised(self) -> None:
        for version in self.records:
            for patient in ("smart-1032702", "smart-1081332"):
                with self.subTest(version=version, patient=patient):
                    self.assertLessEqual({"Patient", "Condition", "MedicationStatement", "AllergyIntolerance",
                                          "social-history", "Immunization",
                                          "MedicationOrder" if version == "dstu2" else "MedicationRequest"},
                                         self.names(self.of_patient(version, patient)))

    def test_elements_are_those_of_the_version(self) -> None:
        for type_name, path, *kinds in ELEMENTS:
            for version, kind in zip(("dstu2", "stu3", "r4"), kinds):
                found = [at(one, path) for one in self.records[version] if one["resourceType"] == type_name]
                with self.subTest(version=version, element=f"{type_name}.{path}"):
                    if kind:
                        self.assertTrue(found)
                    self.assertEqual({type(value) for value in found}, {kind or type(None)} if found else set())

    def test_an_observation_has_a_value_or_components(self) -> None:
        for version, records in self.records.items():
            for one in records:
                if one["resourceType"] == "Observation":
                    self.assertEqual(len({"valueQuantity", "valueCodeableConcept", "component"}.intersection(one)), 1,
                                     (version, one["id"]))

    def test_every_id_is_there_once(self) -> None:
        for version, records in self.records.items():
            ids = [(one["resourceType"], one["id"]) for one in records]
            self.assertEqual(len(ids), len(set(ids)), version)
            self.assertEqual([name for _, name in ids if not re.fullmatch(r"[A-Za-z0-9.-]{1,64}", name)], [], version)

    def test_every_reference_leads_to_a_record(self) -> None:
        for version, records in self.records.items():
            targets = {f"{one['resourceType']}/{one['id']}" for one in records}
            objects = [value for value in walk(records) if isinstance(value, dict)]
            references = {value["reference"] for value in objects if "reference" in value}
            documents = {value["url"] for value in objects if "contentType" in value and "url" in value}
            self.assertGreater(len(references), 90)
            self.assertEqual(len(documents), 2)
            self.assertEqual((references | documents) - targets, set(), version)

    def test_the_people_who_sign_in_are_in_the_records(self) -> None:
        for version, records in self.records.items():
            ids = {f"{one['resourceType']}/{one['id']}" for one in records}
            self.assertLessEqual({"Practitioner/smart-clinician", "RelatedPerson/daniel-adams-amy-shaw"}, ids, version)

    def test_dates_are_of_the_calendar_and_times_have_a_zone(self) -> None:
        for records in self.records.values():
            dates = [value for value in walk(records) if isinstance(value, str) and re.match(r"\d{4}-\d\d", value)]
            self.assertGreater(len(dates), 800)
            for date in dates:
                datetime.datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ" if "T" in date else "%Y-%m-%d")

    def test_changes_are_spread_over_time_alike_in_each_version(self) -> None:
        changed = {version: {one["id"]: one["meta"] for one in records} for version, records in self.records.items()}
        times = sorted(meta["lastUpdated"] for meta in changed["r4"].values())
        self.assertLess(times[0], "2016-02")
        self.assertGreater(times[-1], "2018-06")
        self.assertEqual({meta["versionId"] for meta in changed["r4"].values()}, {"1"})
        for name, meta in changed["r4"].items():
            self.assertEqual(changed["stu3"][name], meta)
            self.assertIn(changed["dstu2"].get(name, meta), (meta,))

    def test_check_digits_know_a_good_code_from_a_bad_one(self) -> None:
        self.assertEqual(luhn("23457") % 10, 0)
        self.assertNotEqual(luhn("23475") % 10, 0)
        self.assertEqual(verhoeff("22298006"), 0)
        self.assertNotEqual(verhoeff("22298060"), 0)

    def test_codes_have_their_system_and_a_right_check_digit(self) -> None:
        codes = {(one.get("system"), one["code"]) for records in self.records.values() for one in walk(records)
                 if isinstance(one, dict) and isinstance(one.get("code"), str)}
        self.assertEqual([code for system, code in codes if not system], [])
        loinc = [code for system, code in codes if system == "http://loinc.org"]
        self.assertGreater(len(loinc), 55)
        self.assertEqual([code for code in loinc if luhn(code.replace("-", "")) % 10], [])
        snomed = [code for system, code in codes if system == "http://snomed.info/sct"]
        self.assertGreater(len(snomed), 30)
        self.assertEqual([code for code in snomed if verhoeff(code) or code[-3:-1] not in ("00", "10")], [])

    def test_units_are_of_ucum(self) -> None:
        units = {one.get("code") for records in self.records.values() for one in walk(records)
                 if isinstance(one, dict) and isinstance(one.get("value"), (int, float)) and "currency" not in one
                 and one.get("system") != "urn:iso:std:iso:4217"}
        self.assertEqual(units, {
            "%", "/[HPF]", "/[LPF]", "/min", "1", "10*3/uL", "10*6/uL", "Cel", "U/L", "[drp]", "[pH]", "cm", "d", "fL",
            "g/dL", "kg", "kg/m2", "mL", "mg/L", "mg/dL", "mm", "mm[Hg]", "mmol/L", "pg", "u[IU]/mL", "{bottle}",
            "{tablet}"})

    def test_each_version_has_its_own_code_systems(self) -> None:
        systems = {version: {one["system"] for one in walk(records) if isinstance(one, dict) and "system" in one}
                   for version, records in self.records.items()}
        self.assertIn("http://terminology.hl7.org/CodeSystem/observation-category", systems["r4"])
        for version in ("stu3", "dstu2"):
            self.assertIn("http://hl7.org/fhir/observation-category", systems[version])
            self.assertIn("http://hl7.org/fhir/v2/0203", systems[version])
            self.assertNotIn("terminology.hl7.org", "".join(systems[version]))
        self.assertIn("http://hl7.org/fhir/v3/Ethnicity", systems["dstu2"])

    def test_vital_signs_have_the_codes_and_units_of_the_profiles(self) -> None:
        expected = {"8867-4": "/min", "9279-1": "/min", "59408-5": "%", "8310-5": "Cel", "8302-2": "cm",
                    "29463-7": "kg", "39156-5": "kg/m2", "8480-6": "mm[Hg]", "8462-4": "mm[Hg]"}
        for version, records in self.records.items():
            signs = {at(one, "code.coding.code"): at(one, "valueQuantity.code") for one in walk(records)
                     if isinstance(one, dict) and isinstance(one.get("code"), dict) and "valueQuantity" in one}
            self.assertEqual({code: signs.get(code) for code in expected}, expected, version)
            oxygen = next(one for one in records if one["id"] == "smart-Observation-854-59408-5")
            self.assertEqual([one["code"] for one in oxygen["code"]["coding"]], ["59408-5", "2708-6"], version)

    def test_common_laboratory_values_can_be_drawn_over_time_with_their_normal_range(self) -> None:
        for loinc in ("2345-7", "2160-0", "13457-7", "2823-3", "718-7", "11580-8"):
            found = [one for one in self.records["r4"] if at(one, "code.coding.code") == loinc]
            self.assertEqual(len({one["effectiveDateTime"] for one in found}), 6, loinc)
            self.assertTrue(all("low" in one["referenceRange"][0] for one in found), loinc)

    def test_a_vaccine_was_refused(self) -> None:
        refused = {version: next(one for one in records if one["id"] == "smart-Immunization-10")
                   for version, records in self.records.items()}
        self.assertEqual(refused["r4"]["status"], "not-done")
        self.assertEqual(at(refused["r4"], "statusReason.coding.code"), "PATOBJ")
        self.assertTrue(refused["stu3"]["notGiven"])
        self.assertTrue(refused["dstu2"]["wasNotGiven"])
        self.assertEqual(at(refused["dstu2"], "explanation.reasonNotGiven.coding.code"), "PATOBJ")

    def test_documents_can_be_opened(self) -> None:
        for version, records in self.records.items():
            binaries = {one["contentType"]: base64.b64decode(one["data" if version == "r4" else "content"])
                        for one in records if one["resourceType"] == "Binary"}
            sizes = {one["contentType"]: one["size"] for one in walk(records)
                     if isinstance(one, dict) and "size" in one}
            self.assertEqual({kind: len(data) for kind, data in binaries.items()}, sizes, version)
            self.assertIn(b"Continue present medicines.", binaries["text/plain"])
            self.assertTrue(binaries["application/pdf"].startswith(b"%PDF-1.4\n"))

    def test_the_pdf_says_where_each_of_its_objects_begins(self) -> None:
        data = s4s.pdf("One (1)\nTwo \\ 2")
        self.assertIn(b"(One \\(1\\)) '\n(Two \\\\ 2) '\n", data)
        table = int(data.split(b"startxref\n")[1].split()[0])
        places = data[table:].splitlines()[3:-5]
        self.assertEqual(data[table:table + 5], b"xref\n")
        self.assertEqual([data[int(place[:10]):].split()[0] for place in places], [b"1", b"2", b"3", b"4", b"5", b"6"])


if __name__ == "__main__":
    unittest.main()
