"""Tests of s4s_proxy.py, over real sockets. Run: python -m unittest"""
from __future__ import annotations

import contextlib
import gzip
import http.client
import http.server
import json
import os
import socket
import threading
import unittest
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, ClassVar
from unittest import mock
from urllib.parse import quote

import s4s_proxy as s4s


class PublishedVectors(unittest.TestCase):
    """Examples that the texts themselves give."""

    def test_the_s256_challenge_of_rfc_7636_appendix_b(self) -> None:
        self.assertEqual(s4s.s256_challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
                         "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM")


class FhirServer:
    """A FHIR server that can't be trusted: it answers each search with all it has, whatever was asked, and `script`
    (path -> status, headers, body; or bytes to send as they are, and close) makes it worse."""

    def __init__(self) -> None:
        self.script: dict[str, tuple[int, dict[str, str], bytes] | bytes] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, dict[str, str], bytes]] = []   # target, headers, body
        self.connections = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                answer = outer.answer(self.path)
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                    self.close_connection = True
                    return
                status, headers, text = answer
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **headers}.items():
                    if value:
                        self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)
                self.wfile.flush()
            do_POST = do_GET

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/fhir"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()

    def answer(self, target: str) -> tuple[int, dict[str, str], bytes] | bytes:
        path = target.partition("?")[0].removeprefix("/fhir/")
        for key in (target, path):
            if key in self.script:
                return self.script[key]
        if path in self.records:
            return json_answer(self.records[path], ETag='W/"7"')
        if "/" in path and not path.endswith(("/_search", "$everything")):
            return json_answer({"resourceType": "OperationOutcome"}, 404)
        return json_answer(self.bundle(*self.records.values()))

    def bundle(self, *resources: dict[str, Any], **links: str) -> dict[str, Any]:
        """A searchset of resources."""
        return {"resourceType": "Bundle", "type": "searchset", "total": len(resources),
                "link": [{"relation": name, "url": url} for name, url in links.items()],
                "entry": [{"fullUrl": f"{self.url}/{one['resourceType']}/{one.get('id')}", "resource": one}
                          for one in resources]}

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def json_answer(value: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A scripted answer."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {"Content-Type": "application/fhir+json", **headers}, text


ME, OTHER = "smart-1288992", "somebody-else"


def observation(name: str, patient: str = ME, **more: Any) -> dict[str, Any]:
    """An Observation of somebody."""
    return {"resourceType": "Observation", "id": name, "status": "final", "code": {"text": "x"},
            "subject": {"reference": f"Patient/{patient}"}, **more}


def document(name: str, patient: str, url: str) -> dict[str, Any]:
    """A DocumentReference of somebody to an attachment."""
    return {"resourceType": "DocumentReference", "id": name, "status": "current",
            "subject": {"reference": f"Patient/{patient}"}, "content": [{"attachment": {"url": url}}]}


class ForwardingCase(unittest.TestCase):
    """A portal in front of a FHIR server that can't be trusted, and a token for one record."""
    fhir: FhirServer
    portal: s4s.Server
    scope = "patient/*.rs"

    @classmethod
    def setUpClass(cls) -> None:
        cls.fhir = FhirServer()
        cls.addClassCleanup(cls.fhir.stop)
        cls.portal = s4s.Server(fhir_server=cls.fhir.url + "/", fhir_header=["X-Api-Key: swordfish"], fhir_timeout=5)
        cls.portal.start()
        cls.addClassCleanup(cls.portal.stop)

    def setUp(self) -> None:
        self.fhir.script.clear()
        self.fhir.seen.clear()
        url = self.fhir.url
        self.fhir.records = {f"{one['resourceType']}/{one['id']}": one for one in (
            {"resourceType": "Patient", "id": ME}, {"resourceType": "Patient", "id": OTHER},
            observation("mine"), observation("theirs", OTHER), {"resourceType": "Practitioner", "id": "dr"},
            document("my-doc", ME, f"{url}/Binary/my-file"), document("their-doc", OTHER, f"{url}/Binary/their-file"),
            {"resourceType": "Binary", "id": "my-file", "contentType": "text/plain", "data": "aGk="},
            {"resourceType": "Binary", "id": "their-file", "contentType": "text/plain", "data": "aGk="})}
        self.token = self.issue(self.scope)

    def issue(self, scope: str, **more: Any) -> str:
        """An access token."""
        return str(self.portal.issue_token(scope=scope, **more)["access_token"])

    def ask(self, path: str, method: str = "GET", body: str | None = None, token: str | None = None,
            api: str = "/api/fhir/", headers: Mapping[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        """One request to the portal: status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.portal.port, timeout=20)
        try:
            form = {"Content-Type": "application/x-www-form-urlencoded"} if body is not None else {}
            token = self.token if token is None else token
            connection.request(method, api + path, body, {
                **form, **({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def read(self, path: str, **more: Any) -> dict[str, Any]:
        """The JSON of a request that must succeed."""
        status, _, body = self.ask(path, **more)
        self.assertEqual(status, 200, body)
        found: dict[str, Any] = json.loads(body)
        return found

    def ids(self, path: str, **more: Any) -> list[str]:
        """The ids in a Bundle that must come."""
        return [entry["resource"]["id"] for entry in self.read(path, **more).get("entry", [])]

    def assert_refused(self, path: str, status: int = 403, **more: Any) -> str:
        """The request is refused with an OperationOutcome; gives what it says."""
        found, _, body = self.ask(path, **more)
        self.assertEqual(found, status, body)
        outcome = json.loads(body)
        self.assertEqual(outcome["resourceType"], "OperationOutcome")
        self.assertNotIn(str(self.fhir.server.server_port), body.decode())
        return str(outcome["issue"][0]["diagnostics"])

    def assert_not_forwarded(self, path: str, status: int = 403, **more: Any) -> None:
        """The request is refused before anything of it reaches the FHIR server."""
        self.assert_refused(path, status, **more)
        self.assertEqual(self.fhir.seen, [])

    def script(self, path: str, resource: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """What the FHIR server answers at a path."""
        self.fhir.script[path] = json_answer(resource, status, **(headers or {}))


class OnePatientAndNothingElse(ForwardingCase):
    """Attacks on the record's boundary, each of which a careless proxy lets through."""

    def test_my_own_resource_is_read(self) -> None:
        self.assertEqual(self.read("Observation/mine")["id"], "mine")

    def test_another_patient_is_not_read(self) -> None:
        self.assert_refused(f"Patient/{OTHER}")

    def test_another_patients_resource_is_not_read(self) -> None:
        self.assert_refused("Observation/theirs")

    def test_another_patients_resource_is_not_read_in_an_older_version(self) -> None:
        self.script("Observation/theirs/_history/1", observation("theirs", OTHER))
        self.assert_refused("Observation/theirs/_history/1")

    def test_my_own_resource_is_read_in_an_older_version(self) -> None:
        self.script("Observation/mine/_history/1", observation("mine"))
        self.assertEqual(self.read("Observation/mine/_history/1")["id"], "mine")

    def test_a_version_that_was_another_patients_is_not_read(self) -> None:
        self.script("Observation/mine/_history/1", observation("mine", OTHER))
        self.assert_refused("Observation/mine/_history/1")

    def test_not_modified_tells_nothing_about_another_patients_resource(self) -> None:
        answers = [json_answer(b"", 304), json_answer(observation("theirs", OTHER))]
        with mock.patch.object(self.fhir, "answer", lambda target: answers.pop(0)):
            self.assert_refused("Observation/theirs", headers={"If-None-Match": 'W/"7"'})

    def test_not_modified_comes_back_for_my_own(self) -> None:
        answers = [json_answer(b"", 304), json_answer(observation("mine"), ETag='W/"7"')]
        with mock.patch.object(self.fhir, "answer", lambda target: answers.pop(0)):
            status, headers, body = self.ask("Observation/mine", headers={"If-None-Match": 'W/"7"'})
        self.assertEqual((status, headers["etag"], body), (304, 'W/"7"', b""))

    def test_a_search_answered_with_everybodys_records_shows_mine(self) -> None:
        bundle = self.read("Observation?code=x")
        self.assertEqual(sorted(entry["resource"]["id"] for entry in bundle["entry"]),
                         ["dr", "mine", "my-doc", ME])
        self.assertNotIn("total", bundle)

    def test_a_search_is_pinned_to_the_patient(self) -> None:
        self.ask("Observation?code=x")
        self.ask("Coverage")
        self.ask("Patient?name=x")
        self.assertEqual([target for target, _, _ in self.fhir.seen], [
            f"/fhir/Observation?code=x&patient=Patient/{ME}", f"/fhir/Coverage?beneficiary=Patient/{ME}",
            f"/fhir/Patient?name=x&_id={ME}"])

    def test_the_patient_may_be_named_in_any_way(self) -> None:
        for query in (f"patient={ME}", f"subject=Patient/{ME}", f"subject:Patient={ME}",
                      f"patient={self.portal.fhir_url}/Patient/{ME}"):
            with self.subTest(query):
                self.assertIn("mine", self.ids(f"Observation?{query}"))

    def test_total_comes_where_nothing_was_dropped(self) -> None:
        self.script("Observation", self.fhir.bundle(observation("mine")))
        self.assertEqual(self.read("Observation")["total"], 1)

    def test_a_search_for_another_patient(self) -> None:
        self.assert_not_forwarded(f"Observation?patient={OTHER}")

    def test_a_search_for_another_patient_by_absolute_reference(self) -> None:
        self.assert_not_forwarded(f"Observation?subject=https://elsewhere.example/fhir/Patient/{ME}")

    def test_a_search_for_another_patient_among_several(self) -> None:
        self.assert_not_forwarded(f"Observation?patient={ME},{OTHER}")

    def test_a_search_for_another_patient_by_id(self) -> None:
        self.assert_not_forwarded(f"Patient?_id={OTHER}")

    def test_a_post_search_for_another_patient(self) -> None:
        self.assert_not_forwarded("Observation/_search", method="POST", body=f"patient={OTHER}")

    def test_a_post_search_with_me_in_the_query_and_another_in_the_body(self) -> None:
        self.assert_not_forwarded(f"Observation/_search?patient={ME}", method="POST", body=f"patient={OTHER}")

    def test_a_post_search_is_posted_and_pinned(self) -> None:
        self.assertIn("mine", self.ids("Observation/_search", method="POST", body="code=a+b"))
        target, headers, body = self.fhir.seen[-1]
        self.assertEqual((target, body), ("/fhir/Observation/_search", f"code=a%20b&patient=Patient/{ME}".encode()))
        self.assertEqual(headers["content-type"], "application/x-www-form-urlencoded")

    def test_a_repeated_parameter(self) -> None:
        self.assert_not_forwarded(f"Observation?patient={ME}&patient={OTHER}")

    def test_a_differently_cased_parameter(self) -> None:
        self.assert_not_forwarded(f"Observation?Patient={OTHER}")

    def test_an_encoded_parameter_name(self) -> None:
        self.assert_not_forwarded(f"Observation?p%61tient={OTHER}")

    def test_a_parameter_with_a_type(self) -> None:
        self.assert_not_forwarded(f"Observation?subject:Patient={OTHER}")

    def test_another_reference_with_a_type(self) -> None:
        self.assert_not_forwarded(f"Observation?performer:Patient={OTHER}")

    def test_another_reference_to_a_patient(self) -> None:
        self.assert_not_forwarded(f"Observation?performer=Patient/{OTHER}")

    def test_a_modifier_that_cannot_be_judged(self) -> None:
        self.assert_not_forwarded("Observation?patient:identifier=http://ids.example%7C1")

    def test_a_chain_with_a_type(self) -> None:
        self.assert_not_forwarded(f"Observation?subject:Patient._id={OTHER}")

    def test_a_chain(self) -> None:
        self.assert_not_forwarded("Observation?performer.name=Smith")

    def test_a_reverse_chain(self) -> None:
        self.assert_not_forwarded(f"Practitioner?_has:Observation:performer:patient={OTHER}")

    def test_the_filter_language(self) -> None:
        self.assert_not_forwarded(f"Observation?_filter=patient%20eq%20{OTHER}")

    def test_a_named_query(self) -> None:
        self.assert_not_forwarded("Observation?_query=everybody")

    def test_a_search_over_types(self) -> None:
        self.assert_not_forwarded("?_type=Patient,Observation")

    def test_types_within_a_search(self) -> None:
        self.assert_not_forwarded("Observation?_type=Patient")

    def test_the_fhir_servers_own_paging_parameter(self) -> None:
        self.assert_not_forwarded("Observation?_getpages=0d33d1e1")

    def test_another_patient_does_not_come_along_by_include(self) -> None:
        self.script("Observation", self.fhir.bundle(observation("mine", performer=[{"reference": f"Patient/{OTHER}"}]),
                                                    self.fhir.records[f"Patient/{OTHER}"]))
        self.assertEqual(self.ids("Observation?_include=Observation:performer"), ["mine"])

    def test_another_patients_resource_does_not_come_along_by_revinclude(self) -> None:
        self.assertEqual(self.ids("Practitioner?_revinclude=Observation:performer"), [ME, "mine", "dr", "my-doc"])

    def test_parts_of_resources_are_not_asked_for_since_they_could_not_be_judged(self) -> None:
        self.ask("Observation?_elements=code&_summary=true&_format=json")
        self.assertEqual(self.fhir.seen[-1][0], f"/fhir/Observation?patient=Patient/{ME}")

    def test_my_compartment(self) -> None:
        self.assertIn("mine", self.ids(f"Patient/{ME}/Observation"))
        self.assertEqual(self.fhir.seen[-1][0], f"/fhir/Observation?patient=Patient/{ME}")

    def test_another_patients_compartment(self) -> None:
        self.assert_not_forwarded(f"Patient/{OTHER}/Observation")

    def test_my_everything(self) -> None:
        self.assertEqual(self.ids(f"Patient/{ME}/$everything?_count=5"), [ME, "mine", "dr", "my-doc"])
        self.assertEqual(self.fhir.seen[-1][0], f"/fhir/Patient/{ME}/$everything?_count=5")

    def test_another_patients_everything(self) -> None:
        self.assert_not_forwarded(f"Patient/{OTHER}/$everything")

    def test_everything_takes_reading_and_searching(self) -> None:
        self.assert_not_forwarded(f"Patient/{ME}/$everything", token=self.issue("patient/*.s"))

    def test_other_operations(self) -> None:
        for path in ("$export", "Patient/$export", "Patient/$match", f"Patient/{ME}/$summary", "Observation/$lastn",
                     "Observation/mine/%24meta", f"Observation/{ME}/$everything"):
            with self.subTest(path):
                self.assert_not_forwarded(path)

    def test_paths_that_hide_something_never_reach_the_fhir_server(self) -> None:
        for path in ("Observation/..", "Observation/../Patient", "Observation/%2e%2e/Patient", "Observation/%2E%2E%2FPatient",
                     "Observation/%252e%252e/Patient", "Observation/mine;a=b", "Observation;a=b", "Observation//mine",
                     "/Observation/mine", "Observation/mine/", "Observation/mine%2f_history", "Observation/mine%3fa=b",
                     "Observation%5cmine", "Observation\\mine", "Observation/mine%00", "Observation/mine%0d%0aX:y",
                     "Observation/.", "observation/mine", "Observation/mine/_history/..", "metadata/..", "Observation/mine/x",
                     f"Patient/{ME}/Observation/mine", "Observation/_search", "http://127.0.0.1/fhir/Observation/mine"):
            with self.subTest(path):
                status, _, body = self.ask(path)
                if status != 200 or path != "Observation/mine/":  # a trailing slash is ignored
                    self.assertIn(status, (400, 403, 404), body)
                    self.assertEqual(self.fhir.seen, [])
                self.fhir.seen.clear()

    def test_an_absolute_request_target_is_served_for_this_host_only(self) -> None:
        for host, expected in ((f"127.0.0.1:{self.portal.port}", 200), ("fhir.example", 421)):
            with self.subTest(host):
                self.assertEqual(self.ask("Observation/mine", api=f"http://{host}/api/fhir/")[0], expected)

    def test_a_batch_is_not_forwarded(self) -> None:
        self.assert_not_forwarded("", method="POST", body="{}")

    def test_writing_is_refused_before_the_body_is_judged(self) -> None:
        for method, path in (("POST", "Observation"), ("PUT", "Observation/mine"), ("PATCH", "Observation/mine"),
                             ("DELETE", "Observation/mine"), ("POST", "Observation/mine/_search")):
            with self.subTest(method):
                self.assert_not_forwarded(path, method=method, body="{")
                self.assert_not_forwarded(path, 401, method=method, body="{", token="")

    def test_open_access_reads_everybodys_and_writes_nothing(self) -> None:
        self.assertEqual(len(self.ids("Observation", token="", api="/api/open-fhir/")), len(self.fhir.records))
        self.assertEqual(self.read("Observation", token="", api="/api/open-fhir/")["total"], len(self.fhir.records))
        self.assertEqual(self.ask("Observation/theirs", token="", api="/api/open-fhir/")[0], 200)
        self.fhir.seen.clear()
        for method, path in (("POST", ""), ("PUT", "Observation/mine"), ("DELETE", "Observation/mine")):
            with self.subTest(method):
                self.assertEqual(self.ask(path, method, "{}", "", "/api/open-fhir/")[0], 405)
        self.assertEqual(self.fhir.seen, [])

    def test_another_patient_inside_my_resource(self) -> None:
        for inner in ({"resourceType": "Patient", "id": OTHER}, observation("x", OTHER), {"resourceType": "Bundle"}):
            with self.subTest(inner["resourceType"]):
                self.script("Observation/mine", observation("mine", contained=[inner]))
                self.assert_refused("Observation/mine")

    def test_my_resource_may_contain_what_is_mine_or_nobodys(self) -> None:
        self.script("Observation/mine", observation("mine", contained=[
            observation("x"), {"resourceType": "Medication", "id": "m"}, {"resourceType": "Specimen", "id": "s"}]))
        self.assertEqual(len(self.read("Observation/mine")["contained"]), 3)

    def test_a_resource_under_a_member_given_twice(self) -> None:
        mine, theirs = (json.dumps(self.fhir.records[f"Observation/{name}"]) for name in ("mine", "theirs"))
        self.script("Observation", ('{"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": ' + theirs
                                    + ', "resource": ' + mine + "}]}").encode())
        self.assertEqual(self.ids("Observation"), [])

    def test_a_bundle_within_the_bundle(self) -> None:
        self.script("Observation", self.fhir.bundle(self.fhir.bundle(observation("theirs", OTHER))))
        self.assertEqual(self.ids("Observation"), [])

    def test_an_outcome_that_quotes_something(self) -> None:
        self.script("Observation", self.fhir.bundle(observation("mine"), {"resourceType": "OperationOutcome", "id": "o"}))
        self.assertEqual(self.ids("Observation"), ["mine"])

    def test_types_nobody_can_place_are_refused(self) -> None:
        for name in ("AuditEvent", "Provenance", "Group", "Bundle", "Person", "Unheard"):
            with self.subTest(name):
                self.assert_not_forwarded(f"{name}/1")
                self.assert_not_forwarded(name)

    def test_what_belongs_to_nobody_needs_only_the_scope(self) -> None:
        self.assertEqual(self.read("Practitioner/dr")["id"], "dr")
        self.assert_refused("Practitioner/dr", token=self.issue("patient/Observation.rs"))

    def test_the_scopes_letters_and_types_hold(self) -> None:
        token = self.issue("patient/Observation.s patient/Practitioner.r")
        self.assert_not_forwarded("Observation/mine", token=token)
        self.assert_not_forwarded("Practitioner", token=token)
        self.assertEqual(self.ids("Observation?_include=*", token=token), ["mine"])

    def test_a_clinician_sees_every_record(self) -> None:
        token = self.issue("user/*.rs", username="clinician", patient_id=ME)
        self.assertEqual(self.read("Observation/theirs", token=token)["id"], "theirs")
        self.assertIn("theirs", self.ids("Observation", token=token))

    def test_a_representative_sees_the_records_of_both(self) -> None:
        self.script("Observation", self.fhir.bundle(*(observation(one, one) for one in (ME, "smart-1032702", OTHER))))
        self.assertEqual(self.ids("Observation", token=self.issue("user/*.rs")), [ME, "smart-1032702"])
        self.assertIn(f"patient=Patient/smart-1032702,Patient/{ME}", self.fhir.seen[-1][0])

    def test_binary_of_another(self) -> None:
        self.assert_refused("Binary/their-file")

    def test_binary_that_my_document_points_to(self) -> None:
        self.assertEqual(self.read("Binary/my-file")["id"], "my-file")
        asked = len(self.fhir.seen)
        self.read("Binary/my-file")
        self.assertEqual(len(self.fhir.seen), asked + 1, "remembered")

    def test_binary_that_my_report_points_to(self) -> None:
        self.script("DocumentReference", b"", 404)
        self.script("DiagnosticReport", self.fhir.bundle({
            "resourceType": "DiagnosticReport", "id": "r", "subject": {"reference": f"Patient/{ME}"},
            "presentedForm": [{"url": "Binary/my-file"}]}))
        self.assertEqual(self.read("Binary/my-file")["id"], "my-file")

    def test_binary_by_its_security_context(self) -> None:
        for patient, expected in ((ME, 200), (OTHER, 403)):
            with self.subTest(patient):
                self.script("Binary/my-file", {"resourceType": "Binary", "id": "my-file",
                                               "securityContext": {"reference": f"Patient/{patient}"}})
                self.assertEqual(self.ask("Binary/my-file")[0], expected)

    def test_binary_of_a_document_that_the_scope_does_not_reach(self) -> None:
        self.assert_refused("Binary/my-file", token=self.issue("patient/Binary.rs"))

    def test_binaries_are_not_searched(self) -> None:
        self.assert_not_forwarded("Binary")

    def test_the_search_for_a_binarys_document_ends(self) -> None:
        self.script("DocumentReference", self.fhir.bundle(next="?_getpages=again"))
        self.fhir.script["/fhir?_getpages=again"] = json_answer(self.fhir.bundle(next="?_getpages=again"))
        self.assert_refused("Binary/my-file")
        self.assertLess(len(self.fhir.seen), 30)

    def test_an_answer_about_another_resource_than_the_one_asked_for(self) -> None:
        self.script("Observation/mine", observation("theirs"))
        self.assert_refused("Observation/mine", 502)


class WhoseItIs(unittest.TestCase):
    """owner() and Access, resource by resource."""

    def test_references_that_count(self) -> None:
        for text in (f"Patient/{ME}", f"Patient/{ME}/_history/2", f"https://p.example/api/fhir/Patient/{ME}"):
            with self.subTest(text):
                self.assertEqual(s4s.owner(observation("x", subject={"reference": text}), "https://p.example/api/fhir"), ME)

    def test_references_that_do_not_count(self) -> None:
        for subject in ({"reference": "Group/1"}, {"reference": "#p"}, {"identifier": {"value": ME}}, {"display": "me"},
                        {"reference": f"https://elsewhere.example/Patient/{ME}"}, {"reference": f"patient/{ME}"},
                        {"reference": f"Patient/{ME}/x"}, {"reference": f"/Patient/{ME}"}, {"reference": [f"Patient/{ME}"]},
                        f"Patient/{ME}", None, 7):
            with self.subTest(subject):
                self.assertIsNone(s4s.owner(observation("x", subject=subject), "https://p.example/api/fhir"))

    def test_each_version_of_fhir_has_its_element(self) -> None:
        person = {"reference": f"Patient/{ME}"}
        for name, more in (("Condition", {"patient": person}), ("Condition", {"subject": person}),
                           ("Coverage", {"beneficiary": person}), ("Task", {"for": person}),
                           ("Account", {"subject": [person]}), ("Patient", {"id": ME}), ("Device", {"patient": person}),
                           ("Appointment", {"participant": [{"actor": {"reference": "Practitioner/1"}}, {"actor": person}]})):
            with self.subTest(name):
                self.assertEqual(s4s.owner({"resourceType": name, **more}), ME)

    def test_several_patients_are_nobodys_answer(self) -> None:
        me, other = {"reference": f"Patient/{ME}"}, {"reference": f"Patient/{OTHER}"}
        for resource in ({"resourceType": "Condition", "subject": me, "patient": other},
                         {"resourceType": "Account", "subject": [me, other]},
                         {"resourceType": "Appointment", "participant": [{"actor": me}, {"actor": other}]},
                         {"resourceType": "Practitioner", "contained": [observation("x", OTHER)]}):
            with self.subTest(resource["resourceType"]):
                self.assertIsNone(s4s.owner(resource))

    def test_a_device_without_a_patient_is_nobodys(self) -> None:
        self.assertEqual(s4s.owner({"resourceType": "Device"}), s4s.NOBODY)
        self.assertIsNone(s4s.owner({"resourceType": "Device", "patient": {"display": "somebody"}}))

    def test_fhir_user_may_be_read_and_not_searched(self) -> None:
        access = s4s.Access("openid fhirUser", ME, fhir_user="Practitioner/dr")
        me, colleague = ({"resourceType": "Practitioner", "id": name} for name in ("dr", "other"))
        self.assertTrue(access.allows("Practitioner", "r", "dr") and access.may_see(me, "r"))
        self.assertFalse(access.allows("Practitioner", "s", "dr") or access.may_see(me, "s"))
        self.assertFalse(access.allows("Practitioner", "r", "other") or access.may_see(colleague, "r"))

    def test_a_scope_narrowed_by_a_parameter(self) -> None:
        access = s4s.Access("patient/Observation.rs", ME)
        access.scopes = [access.scopes[0]._replace(constraints=(("status", "final,amended"),))]
        self.assertTrue(access.narrowed)
        self.assertTrue(access.may_see(observation("x"), "r"))
        self.assertFalse(access.may_see(observation("x", status="preliminary"), "r"))

    def test_categories_hide_and_hide_their_number(self) -> None:
        access = s4s.Access("patient/*.rs", ME, labels=frozenset(["vital-signs"]))
        self.assertTrue(access.narrowed)
        for code, seen in (("vital-signs", True), ("laboratory", False)):
            with self.subTest(code):
                self.assertIs(access.may_see(observation("x", category=[{"coding": [{"code": code}]}]), "s"), seen)

    def test_every_type_of_a_patient_has_a_category(self) -> None:
        covered = {name for _, types in s4s.CATEGORIES.values() for name in types}
        self.assertEqual(set(s4s.OWNER_ELEMENTS) - covered, set())


class NoAddressGetsOut(ForwardingCase):
    """Whatever the FHIR server calls itself, apps see the portal's address."""

    def clean(self, path: str, **more: Any) -> str:
        """An answer in which nothing of the FHIR server's address is left."""
        body = json.dumps(self.read(path, **more))
        self.assertNotIn(str(self.fhir.server.server_port), body)
        self.assertNotIn("hidden.example", body)
        return body

    def spelled(self, text: str) -> dict[str, Any]:
        """What comes of an Observation with this text in it."""
        self.fhir.script["Observation/mine"] = json_answer(json.dumps(observation("mine", note="NOTE")).replace(
            "NOTE", text).encode())
        return dict(json.loads(self.clean("Observation/mine")))

    def test_every_spelling_of_the_base(self) -> None:
        port, ours = self.fhir.server.server_port, self.portal.fhir_url
        for text in (f"http://127.0.0.1:{port}/fhir/Patient/1", f"https://localhost:{port}/fhir/Patient/1",
                     f"http:\\/\\/LocalHost:{port}\\/fhir\\/Patient\\/1", f"http://[::1]:{port}/fhir/Patient/1",
                     f"http:\\u002f\\u002f127.0.0.1\\u003a{port}/fhir/Patient/1"):
            with self.subTest(text):
                self.assertEqual(self.spelled(text)["note"], f"{ours}/Patient/1")

    def test_an_address_within_a_parameter(self) -> None:
        theirs, ours = (quote(url, safe="") for url in (self.fhir.url, self.portal.fhir_url))
        self.assertEqual(self.spelled(f"urn:x?base={theirs}")["note"], f"urn:x?base={ours}")
        self.assertEqual(self.spelled(f"urn:x?base={theirs.lower()}")["note"], f"urn:x?base={ours}")

    def test_other_paths_of_its_host(self) -> None:
        port = self.fhir.server.server_port
        for text in (f"http://127.0.0.1:{port}/admin", f"HTTP://LOCALHOST:{port}/FHIR", f"see localhost:{port}",
                     f"http%3a%2f%2flocalhost%3a{port}%2f", f"http://127.0.0.1:{port}/fhir2"):
            with self.subTest(text):
                self.assertIn("fhir-server.invalid", self.spelled(text)["note"])

    def test_a_name_that_only_looks_alike_stays(self) -> None:
        text = f"http://127.0.0.1:{self.fhir.server.server_port}9/fhir"
        self.fhir.script["Observation/mine"] = json_answer(observation("mine", note=text))
        self.assertEqual(self.read("Observation/mine")["note"], text)

    def test_links_full_urls_and_attachments(self) -> None:
        bundle = json.loads(self.clean("DocumentReference"))
        self.assertIn(f"{self.portal.fhir_url}/Observation/mine", [entry["fullUrl"] for entry in bundle["entry"]])
        self.assertEqual(bundle["entry"][-1]["resource"]["content"][0]["attachment"]["url"],
                         f"{self.portal.fhir_url}/Binary/my-file")
        self.assertEqual(bundle["link"], [{"relation": "self", "url": f"{self.portal.fhir_url}/DocumentReference"}])

    def test_open_access_has_its_own_addresses(self) -> None:
        body = self.clean("Observation", token="", api="/api/open-fhir/")
        self.assertIn(f"{self.portal.open_fhir_url}/Observation/mine", body)
        self.assertNotIn("/api/fhir", body)

    def test_another_name_that_the_server_goes_by(self) -> None:
        bundle = json.dumps(self.fhir.bundle(observation("mine", note="http://hidden.example/r4/Patient/1")))
        self.script("Observation", bundle.replace(self.fhir.url, "http://hidden.example/r4").encode())
        self.assertIn(f'"{self.portal.fhir_url}/Patient/1"', self.clean("Observation"))

    def test_a_reference_by_its_address_is_mine(self) -> None:
        self.script("Observation/mine", observation("mine", subject={"reference": f"{self.fhir.url}/Patient/{ME}"}))
        self.assertIn(f"{self.portal.fhir_url}/Patient/{ME}", self.clean("Observation/mine"))

    def test_decimals_come_through_as_they_were(self) -> None:
        self.script("Observation", json.dumps(self.fhir.bundle(observation("mine"), observation("theirs", OTHER))).replace(
            '"final"', '"final", "valueQuantity": {"value": 1.10}').encode())
        self.assertIn(b'{"value": 1.10}', self.ask("Observation")[2])


class Paging(ForwardingCase):
    """Links to further pages are the portal's own."""

    def pages(self, *links: str) -> None:
        """Pages of one Observation each, with these links to the next."""
        for number, link in enumerate((*links, "")):
            path = f"/fhir?_getpages=abc&_offset={number}" if number else "Observation"
            self.fhir.script[path] = json_answer(self.fhir.bundle(
                observation(f"o{number}"), observation("theirs", OTHER), **({"next": link} if link else {})))

    def next_link(self, path: str, **more: Any) -> str:
        """The path of the link to the next page, "" on the last."""
        links = {link["relation"]: link["url"] for link in self.read(path, **more)["link"]}
        api = self.portal.url + more.get("api", "/api/fhir/")
        self.assertTrue(links.get("next", api).startswith(api))
        return str(links.get("next", api)[len(api):])

    def walk(self) -> list[str]:
        """The Observations of all pages."""
        found, path = [], "Observation?_count=1"
        while path:
            found += self.ids(path)
            path = self.next_link(path)
        return found

    def test_to_the_last_page_by_links_without_a_type(self) -> None:
        self.pages(*(f"{self.fhir.url}?_getpages=abc&_offset={number}" for number in (1, 2, 3)))
        self.assertEqual(self.walk(), ["o0", "o1", "o2", "o3"])

    def test_to_the_last_page_by_relative_links_and_other_names(self) -> None:
        port = self.fhir.server.server_port
        self.pages("/fhir?_getpages=abc&_offset=1", f"http://localhost:{port}/fhir?_getpages=abc&_offset=2",
                   "https://hidden.example/fhir?_getpages=abc&_offset=3")
        self.assertEqual(self.walk(), ["o0", "o1", "o2", "o3"])

    def test_a_link_tells_nothing_of_the_address(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        self.assertRegex(self.next_link("Observation"), r"^Observation\?_page=[\w-]{22}$")

    def test_a_stolen_link(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        link = self.next_link("Observation")
        self.fhir.seen.clear()
        self.assert_not_forwarded(link, token=self.issue(self.scope))
        self.assertEqual(self.ask(link, token="", api="/api/open-fhir/")[0], 403)
        self.assertEqual(self.ids(link), ["o1"])

    def test_a_link_of_open_access_works_there_only(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        link = self.next_link("Observation", token="", api="/api/open-fhir/")
        self.assertEqual(self.ids(link, token="", api="/api/open-fhir/"), ["o1", "theirs"])
        self.assert_refused(link)

    def test_a_link_works_for_its_own_path_only(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        self.assert_refused(self.next_link("Observation").replace("Observation", "Patient"))

    def test_a_link_takes_no_other_parameter(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        self.assert_refused(self.next_link("Observation") + f"&patient={OTHER}", 400)

    def test_a_link_expires(self) -> None:
        self.pages(f"{self.fhir.url}?_getpages=abc&_offset=1")
        link, expires = self.next_link("Observation"), s4s.PAGE_SECONDS
        self.addCleanup(self.portal.advance, -expires)
        self.portal.advance(expires)
        self.assert_refused(link, 404, token=self.issue(self.scope))

    def test_links_are_bounded_in_number(self) -> None:
        portal = self.portal.portal
        urls = {str(number): "x" for number in range(s4s.MAX_LINKS)}
        first = s4s.keep_pages(portal, "g", "p", urls)
        self.assertEqual(s4s.kept_page(portal, "g", "p", first["0"]), "x")
        s4s.keep_pages(portal, "g", "p", {"one": "y"})
        with self.assertRaises(s4s.PortalError):
            s4s.kept_page(portal, "g", "p", first["0"])

    def test_a_link_that_leads_elsewhere(self) -> None:
        for link in ("https://hidden.example/other?page=2", "/fhir/../admin", "/fhir/%2e%2e/admin", "file:///etc/passwd",
                     "//[", "/fhirs", "/fhir//x"):
            with self.subTest(link):
                self.pages(link)
                self.assert_refused("Observation", 502)

    def test_a_portal_behind_a_portal(self) -> None:
        with s4s.Server() as back, s4s.Server(fhir_server=back.open_fhir_url) as front:
            token = front.issue_token(scope="patient/Observation.rs")["access_token"]
            found: list[str] = []
            url = front.fhir_url + "/Observation?_count=100"
            while url:
                request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
                with urllib.request.urlopen(request) as answer:
                    bundle = json.load(answer)
                found += [entry["resource"]["id"] for entry in bundle["entry"]]
                url = next((link["url"] for link in bundle["link"] if link["relation"] == "next"), "")
            self.assertEqual(len(found), len(set(found)))
            self.assertGreater(len(found), 200)


class Faults(ForwardingCase):
    """What may go wrong behind the portal, and what the app is told of it."""

    def test_busy_is_passed_on_with_the_time_to_wait(self) -> None:
        for status in (503, 429):
            with self.subTest(status):
                self.script("Observation/mine", b"", status, {"Retry-After": "7"})
                self.assert_refused("Observation/mine", status)
                self.assertEqual(self.ask("Observation/mine")[1]["retry-after"], "7")

    def test_absent_is_404_and_deleted_410_without_the_servers_words(self) -> None:
        for status in (404, 410):
            with self.subTest(status):
                self.script("Observation/mine", {"resourceType": "OperationOutcome", "text": self.fhir.url}, status)
                self.assert_refused("Observation/mine", status)

    def test_a_search_that_is_not_accepted_is_400(self) -> None:
        self.script("Observation", b"{}", 422)
        self.assert_refused("Observation?unheard=of", 400)

    def test_its_own_troubles_are_502(self) -> None:
        for status in (401, 403, 500, 502, 418, 206, 202):
            with self.subTest(status):
                self.script("Observation/mine", {"resourceType": "OperationOutcome"}, status)
                self.assert_refused("Observation/mine", 502)

    def test_answers_that_are_no_fhir_are_502(self) -> None:
        mine = json.dumps(observation("mine"))
        for name, body in {
                "HTML": b"<html>", "empty": b"", "array": b"[]", "null": b"null", "no type": b"{}", "cut": mine[:-2].encode(),
                "NaN": mine.replace('"final"', "NaN").encode(), "twice": (mine + mine).encode(),
                "byte order mark": b"\xef\xbb\xbf" + mine.encode(), "UTF-16": mine.encode("utf-16"),
                "no UTF-8": mine.replace("final", "\xff").encode("latin-1"), "control": mine.replace("final", "\0").encode(),
                "deep": b'{"a":' * 100_000, "outcome": b'{"resourceType": "OperationOutcome"}'}.items():
            with self.subTest(name):
                self.script("Observation/mine", body)
                self.assert_refused("Observation/mine", 502)

    def test_searches_answered_with_no_bundle_are_502(self) -> None:
        for body in (b"", b"{", b"[]", b'{"resourceType": "Bundle"}', b'{"resourceType": "Bundle", "type": "batch-response"}',
                     b'{"resourceType": "Bundle", "type": "searchset", "entry": [}', b'{"entry": {}}', b'{"entry": [1 2]}',
                     b'{"resourceType": "Bundle", "type": "searchset"} {}', b'{"resourceType" "Bundle"}', b'{1: 2}'):
            with self.subTest(body):
                self.script("Observation", body)
                self.assert_refused("Observation", 502)

    def test_odd_bundles_are_no_trouble(self) -> None:
        for entry in (b"[]", b"[null, 1, {}, [], {\"resource\": []}, {\"fullUrl\": 1, \"resource\": {\"resourceType\": 1}}]"):
            with self.subTest(entry):
                self.script("Observation", b'{"resourceType": "Bundle", "type": "searchset", "link": [1], "entry": '
                            + entry + b"}")
                self.assertEqual(self.ids("Observation"), [])

    def test_broken_http_is_502(self) -> None:
        for name, data in {
                "silence": b"", "no HTTP": b"SSH-2.0\r\n\r\n", "no header's end": b"HTTP/1.1 200 OK\r\nA: b\r\n",
                "bad header": b"HTTP/1.1 200 OK\r\nA b\r\n\r\n", "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
                "two ends": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
                "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
                "bad length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
                "unknown coding": b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
                "huge": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                "huge header": b"HTTP/1.1 200 OK\r\n" + b"A: " + b"b" * s4s.MAX_HEAD}.items():
            with self.subTest(name):
                self.fhir.script["Observation/mine"] = data
                self.assert_refused("Observation/mine", 502)

    def test_an_answer_too_large_is_502(self) -> None:
        with mock.patch.object(s4s, "MAX_ANSWER", 1000):
            large = json.dumps(observation("mine", note="x" * 1000)).encode()
            for name, headers, body in (("length", {}, large), ("to the end", {"Content-Length": "", "Connection": "close"}, large),
                                        ("bomb", {"Content-Encoding": "gzip"}, gzip.compress(large))):
                with self.subTest(name):
                    self.script("Observation/mine", body, 200, headers)
                    self.assert_refused("Observation/mine", 502)

    def test_broken_gzip_is_502(self) -> None:
        good = gzip.compress(json.dumps(observation("mine")).encode())
        for body in (b"{}", good[:-5], good + b"x"):
            self.script("Observation/mine", body, 200, {"Content-Encoding": "gzip"})
            self.assert_refused("Observation/mine", 502)

    def test_gzip_chunks_and_interim_answers_are_understood(self) -> None:
        body = gzip.compress(json.dumps(observation("mine")).encode())
        self.fhir.script["Observation/mine"] = (
            b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (
                body[:20], body[20:])) + b"0\r\nTrailer: x\r\n\r\n")
        self.assertEqual(self.read("Observation/mine")["id"], "mine")

    def test_unreachable_is_502(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with s4s.Server(fhir_server=f"http://127.0.0.1:{unused.getsockname()[1]}") as portal:
                request = urllib.request.Request(portal.open_fhir_url + "/Patient/1")
                with self.assertRaises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(request)
                self.assertEqual(caught.exception.code, 502)
                self.assertNotIn(str(unused.getsockname()[1]), caught.exception.read().decode())
                caught.exception.close()

    def test_too_slow_is_504_also_byte_by_byte(self) -> None:
        for drip in (b"", b"H", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"):
            with self.subTest(drip), socket.create_server(("127.0.0.1", 0)) as slow:
                self.assertEqual(self.status_while_dripping(slow, drip), 504)

    def status_while_dripping(self, slow: socket.socket, drip: bytes) -> int:
        """What the portal answers in front of a server that sends `drip`, then a byte every now and then."""
        portal = s4s.Portal(s4s.Settings(fhir_server=f"http://127.0.0.1:{slow.getsockname()[1]}", fhir_timeout=0.1))
        self.addCleanup(portal.close)
        request = s4s.Request("GET", "/api/open-fhir/Patient/1", {"host": "127.0.0.1"})
        answers: list[s4s.Response] = []
        asking = threading.Thread(target=lambda: answers.append(s4s.dispatch(portal, request)))
        asking.start()
        with slow.accept()[0] as connection:
            connection.sendall(drip)
            while asking.is_alive():
                with contextlib.suppress(OSError):
                    connection.sendall(b"x" if drip else b"")
                asking.join(0.02)
        return answers[0].status

    def test_redirects_stay_within_the_fhir_server(self) -> None:
        self.script("Observation/1", b"", 302, {"Location": "/fhir/Observation/2"})
        self.script("Observation/2", observation("1"))
        self.assertEqual(self.read("Observation/1")["id"], "1")
        for place in ("http://hidden.example/", "/elsewhere", "/fhir/../x", "/fhir/Observation/1", ""):
            with self.subTest(place):
                self.script("Observation/1", b"", 302, {"Location": place})
                self.assert_refused("Observation/1", 502)


class Transport(ForwardingCase):
    """What travels, and over which connections."""

    def test_connections_are_reused(self) -> None:
        self.read("Observation/mine")
        before = self.fhir.connections
        for _ in range(5):
            self.read("Observation/mine")
        self.assertEqual(self.fhir.connections, before)

    def test_a_connection_closed_in_between_is_no_trouble(self) -> None:
        closing = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(json.dumps(observation("mine")))
        self.fhir.script["Observation/mine"] = closing + json.dumps(observation("mine")).encode()
        for _ in range(5):
            self.read("Observation/mine")
        self.assertEqual(len(self.fhir.seen), 5)

    def test_many_threads_share_them(self) -> None:
        self.fhir.records.update({f"Observation/o{number}": observation(f"o{number}") for number in range(8)})
        wrong: list[str] = []

        def ask(name: str) -> None:
            for _ in range(20):
                if self.read(f"Observation/{name}")["id"] != name:
                    wrong.append(name)
        threads = [threading.Thread(target=ask, args=(f"o{number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((wrong, len(self.fhir.seen)), ([], 160))

    def test_credentials_of_the_app_stay_here(self) -> None:
        self.ask("Observation/mine", headers={"Cookie": "a=b", "X-Other": "c"})
        headers = self.fhir.seen[-1][1]
        self.assertEqual({"authorization", "cookie", "x-other"} & headers.keys(), set())
        self.assertNotIn(self.token, str(self.fhir.seen))

    def test_what_travels(self) -> None:
        sent = {"Prefer": "handling=strict", "If-None-Match": 'W/"3"', "If-Modified-Since": "Thu, 31 May 2018 22:48:43 GMT"}
        self.ask("Observation/mine", headers={**sent, "Accept": "application/json"})
        headers = self.fhir.seen[0][1]
        self.assertEqual({name: headers.get(name.lower()) for name in sent}, sent)
        self.assertEqual(headers["x-api-key"], "swordfish")
        self.assertIn("application/json+fhir", headers["accept"])

    def test_what_comes_back(self) -> None:
        self.script("Observation/mine", observation("mine"), 200, {
            "ETag": 'W/"4"', "Last-Modified": "Thu, 31 May 2018 22:48:43 GMT", "Set-Cookie": "a=b", "Server": "secret",
            "Content-Location": "x"})
        headers = self.ask("Observation/mine")[1]
        self.assertEqual((headers["etag"], headers["last-modified"]), ('W/"4"', "Thu, 31 May 2018 22:48:43 GMT"))
        self.assertEqual({"set-cookie", "server", "content-location"} & headers.keys(), set())

    def test_head_is_judged_like_get(self) -> None:
        status, headers, body = self.ask("Observation/mine", "HEAD")
        self.assertEqual((status, body, headers["etag"]), (200, b"", 'W/"7"'))
        self.assertEqual(self.ask("Observation/theirs", "HEAD")[0], 403)

    def test_only_json(self) -> None:
        self.assert_not_forwarded("Observation/mine", 406, headers={"Accept": "application/fhir+xml"})

    def test_proxies_of_the_environment_are_not_used(self) -> None:
        with mock.patch.dict(os.environ, {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}):
            self.read("Observation/mine")


class WhatIsBehind(ForwardingCase):
    """Metadata, version and patients of the FHIR server."""

    STATEMENT: ClassVar[dict[str, Any]] = {
        "resourceType": "CapabilityStatement", "fhirVersion": "4.0.1", "implementation": {"url": "http://hidden.example"},
        "rest": [{"mode": "server", "security": {"description": "hidden.example"}, "operation": [{"name": "export"}], "resource": [
            {"type": "Observation", "interaction": [{"code": code} for code in ("read", "vread", "create", "search-type")],
             "searchParam": [{"name": "code", "type": "token", "documentation": "hidden.example"}, {"name": "_has", "type": "string"},
                             {"name": "_id", "type": "token"}]},
            {"type": "AuditEvent", "interaction": [{"code": "read"}]}, {"type": "Patient", "interaction": [{"code": "create"}]}]}]}

    def portal_with(self, statement: dict[str, Any]) -> s4s.Portal:
        """A portal of its own, that has not asked yet."""
        self.script("metadata", statement)
        portal = s4s.Portal(s4s.Settings(fhir_server=self.fhir.url))
        self.addCleanup(portal.close)
        return portal

    def metadata(self, portal: s4s.Portal, api: str) -> tuple[int, dict[str, Any], str]:
        answer = s4s.dispatch(portal, s4s.Request("GET", f"/api/{api}/metadata", {"host": "127.0.0.1:1"}))
        return answer.status, json.loads(answer.body), answer.body.decode()

    def test_metadata_lists_what_the_portal_lets_through(self) -> None:
        portal = self.portal_with(self.STATEMENT)
        _, found, text = self.metadata(portal, "fhir")
        self.assertNotIn("hidden.example", text)
        self.assertEqual(found["rest"][0]["resource"], [{
            "type": "Observation", "interaction": [{"code": "read"}, {"code": "vread"}, {"code": "search-type"}],
            "searchParam": [{"name": "code", "type": "token"}, {"name": "_id", "type": "token"}]}])
        self.assertIn("/oauth/authorize", json.dumps(found["rest"][0]["security"]))
        self.assertNotIn("security", self.metadata(portal, "open-fhir")[1]["rest"][0])

    def test_metadata_is_asked_for_every_five_minutes_at_most(self) -> None:
        portal = self.portal_with(self.STATEMENT)
        for seconds, asked in ((0, 1), (299, 1), (2, 2)):
            portal.clock.advance(seconds)
            self.metadata(portal, "fhir")
            self.assertEqual(len(self.fhir.seen), asked)

    def test_no_metadata_is_502(self) -> None:
        self.assertEqual(self.metadata(self.portal_with({"resourceType": "Patient"}), "fhir")[0], 502)

    def test_the_version_is_the_fhir_servers(self) -> None:
        for text, version in (("1.0.2", "dstu2"), ("3.0.1", "stu3"), ("4.0.1", "r4"), ("4.3.0", "r4")):
            with self.subTest(text):
                self.assertEqual(s4s.fhir_version(self.portal_with({**self.STATEMENT, "fhirVersion": text})), version)

    def test_without_metadata_r4_is_assumed_and_a_warning_logged_once(self) -> None:
        portal = self.portal_with({})
        lines: list[str] = []
        portal.log = lines.append
        self.assertEqual([s4s.fhir_version(portal) for _ in range(3)], ["r4"] * 3)
        self.assertEqual(len(lines), 1)
        self.assertIn("R4 is assumed", lines[0])

    def test_patients_are_found_by_name(self) -> None:
        names: tuple[Any, ...] = ([{"given": ["Ann", "B"], "family": ["Cee"]}], [{"text": "Dee"}], [])
        self.script("Patient", self.fhir.bundle(*({"resourceType": "Patient", "id": f"p{number}", "name": name}
                                                  for number, name in enumerate(names)), observation("x")))
        self.assertEqual(s4s.upstream_patients(self.portal.portal, "a&b"), [("p0", "Ann B Cee"), ("p1", "Dee"), ("p2", "p2")])
        self.assertEqual(self.fhir.seen[-1][0], "/fhir/Patient?name=a%26b&_count=50")

    def test_a_patient_is_there_or_not(self) -> None:
        self.assertEqual(s4s.upstream_patient(self.portal.portal, ME), ME)
        self.assertIsNone(s4s.upstream_patient(self.portal.portal, "../x"))

    def test_settings_that_cannot_be(self) -> None:
        for settings in ({"fhir_server": "ftp://x/"}, {"fhir_server": "x"}, {"fhir_server": "http://u@h/"}, {"fhir_server": "http:///x"},
                         {"fhir_server": "http://h/?a"}, {"fhir_server": "http://h/#a"}, {"fhir_server": "http://h:99999"},
                         {"fhir_server": "http://h/../a"}, {"fhir_server": 7},
                         {"fhir_header": "x"}, {"fhir_header": "A: b\r\nC: d"}, {"fhir_header": ["Host: x"]},
                         {"fhir_header": "Content-Length: 1"}, {"fhir_timeout": 0}, {"fhir_timeout": float("nan")},
                         {"fhir_timeout": "soon"}):
            with self.subTest(settings), self.assertRaises(s4s.StartError):
                s4s.Settings(**settings)


if __name__ == "__main__":
    unittest.main()
