"""Tests of s4s_proxy.py: a real server, real sockets, one behaviour a test. Run: python -m unittest

    python -m unittest                              all of them
    python -m unittest test_s4s_proxy.TokenEndpoint one endpoint's
"""
from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import html.parser
import http.client
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit

import s4s_proxy as s4s

HERE = Path(__file__).resolve().parent
DANIEL, AMY, JOSEPH = "smart-1288992", "smart-1032702", "smart-1081332"


# ######################################################################## helpers: a client, an app, a browser

class Answer:
    """An HTTP answer. `headers` has lower-case names."""
    def __init__(self, status: int, headers: list[tuple[str, str]], body: bytes):
        self.status, self.body = status, body
        self.headers = {name.lower(): value for name, value in headers}
        self.cookies = [value for name, value in headers if name.lower() == "set-cookie"]

    @property
    def text(self) -> str:
        return self.body.decode("utf-8")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def location(self) -> dict[str, str]:
        """The query of where this answer redirects to."""
        return dict(parse_qsl(urlsplit(self.headers["location"]).query, keep_blank_values=True))

    def __repr__(self) -> str:
        return f"<{self.status} {self.body[:300]!r}>"


def ask(url: str, *, method: str = "", form: Any = None, data: Any = None, body: bytes | None = None,
        basic: tuple[str, str] | None = None, token: str = "", headers: dict[str, str] | None = None) -> Answer:
    """One request, redirects not followed: `form` is sent as a form, `data` as JSON, `body` as it is."""
    parts, sent = urlsplit(url), dict(headers or {})
    if form is not None:
        body = urlencode(form).encode()
        sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
    elif data is not None:
        body = json.dumps(data).encode()
        sent.setdefault("Content-Type", "application/json")
    if basic:
        sent["Authorization"] = "Basic " + base64.b64encode(":".join(basic).encode()).decode()
    if token:
        sent["Authorization"] = "Bearer " + token
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request(method or ("GET" if body is None else "POST"),
                           (parts.path or "/") + ("?" + parts.query if parts.query else ""), body, sent)
        got = connection.getresponse()
        return Answer(got.status, got.getheaders(), got.read())
    finally:
        connection.close()


class Form(html.parser.HTMLParser):
    """A form of a page: its method, its action, and what it would send untouched; buttons by id, name or text."""
    def __init__(self, page: str, index: int = 0):
        super().__init__()
        self.method, self.action, self.fields, self.buttons = "get", "", [], []  # type: str, str, list[Any], list[Any]
        self.inputs: list[dict[str, Any]] = []
        self._index, self._at, self._inside, self._button = index, -1, False, None  # type: int, int, bool, Any
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "form":
            self._at += 1
            self._inside = self._at == self._index
            if self._inside:
                self.method, self.action = attributes.get("method") or "get", attributes.get("action") or ""
        elif self._inside and tag == "input":
            self.inputs.append(attributes)
            if "name" in attributes and (attributes.get("type") != "checkbox" or "checked" in attributes):
                self.fields.append((attributes["name"], attributes.get("value") or ""))
        elif self._inside and tag == "button":
            self._button = {**attributes, "text": ""}
            self.buttons.append(self._button)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False
        elif tag == "button":
            self._button = None

    def handle_data(self, data: str) -> None:
        if self._button:
            self._button["text"] += data


class Browser:
    """What a person uses: cookies, links, forms. It follows redirects within the portal and stops at the app's."""
    def __init__(self, portal: s4s.Server):
        self.portal, self.cookies, self.page = portal, {}, Answer(0, [], b"")  # type: Any, dict[str, str], Answer
        self.url = portal.url

    def open(self, url: str, method: str = "GET", fields: list[tuple[str, str]] | None = None) -> Answer:
        """Go to a URL; the answer is that of the last page, or the redirect that leaves the portal."""
        for _ in range(10):
            headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
            self.url = url
            self.page = ask(url, method=method, form=fields if method == "POST" else None,
                            headers=headers if self.cookies else {})
            for cookie in self.page.cookies:
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
            target = urljoin(url, self.page.headers.get("location", ""))
            if self.page.status not in (302, 303) or not target.startswith(self.portal.url):
                return self.page
            url, method, fields = target, "GET", None
        raise AssertionError("redirects without end")

    def submit(self, button: str = "", form: int = 0, without: str = "", **changed: str) -> Answer:
        """Submit a form of the page by a button (its id, value, name or text), with some fields changed, those of the
        name `without` left out."""
        found = Form(self.page.text, form)
        fields = [(name, changed.pop(name, value)) for name, value in found.fields if name != without]
        fields += list(changed.items())
        for one in found.buttons:
            if button and button in (one.get("id"), one.get("value"), one.get("data-patient-id"), one["text"]):
                fields += [(one["name"], one.get("value", ""))] if "name" in one else []
                break
        else:
            assert not button, f"no button {button!r} in {found.buttons}"
        url = urljoin(self.url, found.action)
        if found.method.lower() == "post":
            return self.open(url, "POST", fields)
        return self.open(url + "?" + urlencode(fields))

    def sign_in(self, username: str = "daniel-adams", password: str = "demo-password") -> Answer:
        """Fill in the sign-in page."""
        return self.submit("sign-in", username=username, password=password)


class App:
    """A small SMART app: it asks for authorization and exchanges codes."""
    redirect_uri = "https://app.example/cb?own=1"

    def __init__(self, portal: s4s.Server, scope: str = "launch/patient patient/*.rs offline_access",
                 **metadata: Any):
        self.portal, self.scope = portal, scope
        given = portal.register_client(redirect_uris=[self.redirect_uri], scope=scope, **metadata)
        self.client_id, self.secret = given["client_id"], given.get("client_secret", "")
        self.verifier = secrets.token_urlsafe(48)
        self.state = "s;t a/t+e%7E~"

    def authorize_url(self, **changed: str | None) -> str:
        """The address the app sends the browser to; None leaves a parameter out."""
        challenge = base64.urlsafe_b64encode(hashlib.sha256(self.verifier.encode()).digest()).rstrip(b"=").decode()
        fields: dict[str, str | None] = {
            "response_type": "code", "client_id": self.client_id, "redirect_uri": self.redirect_uri,
            "scope": self.scope, "state": self.state, "aud": self.portal.fhir_url, "code_challenge": challenge,
            "code_challenge_method": "S256", **changed}
        return f"{self.portal.url}/oauth/authorize?" + urlencode(
            {name: value for name, value in fields.items() if value is not None})

    def code(self, username: str = "daniel-adams", patient_id: str | None = None, **changed: Any) -> str:
        """A code that a user approved."""
        back = self.portal.approve(self.authorize_url(**changed), username=username, patient_id=patient_id)
        return dict(parse_qsl(urlsplit(back).query))["code"]

    def token_request(self, **form: str) -> Answer:
        """A request of the token endpoint, with this app's authentication."""
        if self.secret:
            return ask(f"{self.portal.url}/oauth/token", form=form, basic=(self.client_id, self.secret))
        return ask(f"{self.portal.url}/oauth/token", form={"client_id": self.client_id, **form})

    def exchange(self, code: str, **changed: str) -> Answer:
        """Tokens for a code."""
        return self.token_request(**{"grant_type": "authorization_code", "code": code,
                                     "redirect_uri": self.redirect_uri, "code_verifier": self.verifier, **changed})

    def refresh(self, refresh_token: str, **changed: str) -> Answer:
        """New tokens for a refresh token."""
        return self.token_request(grant_type="refresh_token", refresh_token=refresh_token, **changed)

    def tokens(self, **approved: Any) -> Any:
        """The whole flow."""
        return self.exchange(self.code(**approved)).json


class PortalTest(unittest.TestCase):
    """A class of tests has one server, reset before each test."""
    settings: ClassVar[dict[str, Any]] = {}
    portal: s4s.Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.portal = s4s.Server(**cls.settings).start()
        cls.addClassCleanup(cls.portal.stop)

    def setUp(self) -> None:
        self.portal.reset()

    def fhir(self, path: str, token: Any = None, **how: Any) -> Answer:
        """A request of the FHIR API; `token` is a token response, or a token."""
        value = token["access_token"] if isinstance(token, dict) else token or ""
        return ask(f"{self.portal.fhir_url}/{path}", token=value, **how)

    def post(self, path: str, data: Any, **how: Any) -> Answer:
        """JSON to the portal."""
        return ask(self.portal.url + path, data=data, **how)


# ######################################################################## published vectors

class PublishedVectors(unittest.TestCase):
    """Examples that the texts themselves give."""

    def test_the_s256_challenge_of_rfc_7636_appendix_b(self) -> None:
        self.assertEqual(s4s.s256_challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
                         "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM")


# ######################################################################## S4S, as documented

class Registration(PortalTest):
    """POST /oauth/register (RFC 7591), as S4S documented it."""

    def test_an_app_gets_an_id_and_a_secret(self) -> None:
        sent = {"client_name": "My App", "redirect_uris": ["https://app.example/cb"], "scope": "patient/*.read"}
        got = self.post("/oauth/register", sent)
        self.assertEqual(got.status, 201)
        self.assertEqual({name: got.json[name] for name in sent}, sent)
        self.assertRegex(got.json["client_id"], r"^[0-9a-f-]{36}$")
        self.assertRegex(got.json["client_secret"], r"^[0-9a-f-]{36}$")
        self.assertEqual(got.json["client_secret_expires_at"], 0)
        self.assertEqual(got.headers["cache-control"], "no-store")

    def test_the_name_of_an_app_without_one_is_its_id(self) -> None:
        got = self.post("/oauth/register", {"redirect_uris": ["https://app.example/cb"]}).json
        self.assertEqual(got["client_name"], got["client_id"])

    def test_redirect_uris_that_would_run_or_lead_astray_are_refused(self) -> None:
        for uri in ("javascript:alert(1)", "data:text/html,x", "/relative", "https://a.example/#fragment", "https://",
                    "http://user@host/", "", 7, None, "file:///etc/passwd", "https://a b/", "https://a.example:0/"):
            with self.subTest(uri=uri):
                got = self.post("/oauth/register", {"redirect_uris": [uri]})
                self.assertEqual(got.status, 400)
                self.assertIn(got.json["error"], ("invalid_redirect_uri", "invalid_client_metadata"))

    def test_a_private_use_scheme_is_fine(self) -> None:
        got = self.post("/oauth/register", {"redirect_uris": ["com.example.app:/cb", "org.app://callback"]})
        self.assertEqual(got.status, 201)

    def test_at_least_one_redirect_uri_is_needed_for_the_code_flow(self) -> None:
        self.assertEqual(self.post("/oauth/register", {"client_name": "x"}).json["error"], "invalid_redirect_uri")

    def test_members_of_a_wrong_type_are_named(self) -> None:
        for member, value in (("client_name", 5), ("scope", ["a"]), ("redirect_uris", "https://app.example/cb"),
                              ("grant_types", "authorization_code"), ("token_endpoint_auth_method", 1)):
            with self.subTest(member=member):
                got = self.post("/oauth/register", {"redirect_uris": ["https://app.example/cb"], member: value})
                self.assertEqual(got.status, 400)
                self.assertIn(member, got.json["error_description"])

    def test_a_body_that_is_no_json_object_is_refused_in_words(self) -> None:
        for body in (b"", b"{", b"[]", b"7", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"a":' * 50_000):
            with self.subTest(body=body[:20]):
                got = ask(self.portal.url + "/oauth/register", body=body, headers={"Content-Type": "application/json"})
                self.assertEqual((got.status, got.json["error"]), (400, "invalid_request"))

    def test_another_content_type_is_415(self) -> None:
        self.assertEqual(ask(self.portal.url + "/oauth/register", form={"a": "b"}).status, 415)


class DebugToken(PortalTest):
    """POST /oauth/debug/token (S4S)."""

    def token(self, **members: Any) -> Answer:
        return self.post("/oauth/debug/token", {"client_id": "test-suite", "username": "daniel-adams", **members})

    def test_a_token_opens_the_users_own_record(self) -> None:
        got = self.token()
        self.assertEqual(got.status, 200)
        self.assertEqual({name: got.json[name] for name in ("token_type", "expires_in", "scope", "patient")}, {
            "token_type": "Bearer", "expires_in": 3600, "scope": "launch/patient patient/*.read offline_access",
            "patient": DANIEL})
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", got.json).json["id"], DANIEL)

    def test_user_name_is_read_as_username(self) -> None:
        got = self.post("/oauth/debug/token", {"client_id": "test-suite", "user_name": "joseph-ross"})
        self.assertEqual(got.json["patient"], JOSEPH)

    def test_a_daughters_record_can_be_asked_for(self) -> None:
        self.assertEqual(self.token(patient_id=AMY).json["patient"], AMY)

    def test_numbers_may_come_as_strings(self) -> None:
        self.assertEqual(self.token(access_lifetime="60", approval_expires=str(time.time() + 99.5)).json["expires_in"], 60)

    def test_a_token_may_be_born_expired(self) -> None:
        for members in ({"access_lifetime": 0}, {"access_lifetime": -5}, {"approval_expires": 1_000_000_000}):
            with self.subTest(members=members):
                got = self.token(**members)
                self.assertEqual((got.status, got.json["expires_in"]), (200, 0))
                self.assertEqual(self.fhir(f"Patient/{DANIEL}", got.json).status, 401)

    def test_wrong_input_is_a_400_that_names_it(self) -> None:
        for member, value in (
                ("client_id", "nobody"), ("username", "nobody"), ("patient_id", "nobody"), ("patient_id", JOSEPH),
                ("access_lifetime", "soon"), ("access_lifetime", 1e308), ("access_lifetime", "nan"),
                ("access_lifetime", True), ("approval_expires", "inf"), ("approval_expires", 1e15),
                ("approval_expires", []), ("client_id", 5), ("username", None), ("scope", 7), ("scope", "nonsense"),
                ("unknown", 1)):
            with self.subTest(member=member, value=value):
                got = self.token(**{member: value})
                self.assertEqual(got.status, 400)
                self.assertIn(member, got.json["error_description"])

    def test_client_id_and_username_are_required(self) -> None:
        for name in ("client_id", "username"):
            members = {"client_id": "test-suite", "username": "daniel-adams"}
            del members[name]
            self.assertIn(name, self.post("/oauth/debug/token", members).json["error_description"])

    def test_another_web_page_can_not_ask(self) -> None:
        self.assertEqual(self.post("/oauth/debug/token", {}, headers={"Origin": "https://evil.example"}).status, 403)
        self.assertEqual(ask(self.portal.url + "/oauth/debug/token", form={"client_id": "test-suite"}).status, 415)


class DebugIntrospect(PortalTest):
    """GET /oauth/debug/introspect (S4S)."""

    def look(self, token: str) -> Any:
        return ask(f"{self.portal.url}/oauth/debug/introspect/?token={token}").json

    def test_an_access_token_and_its_refresh_token_show_the_same(self) -> None:
        given = self.portal.issue_token(approval_expires=1527806923 + 10 ** 9)
        seen = self.look(given["access_token"])
        self.assertEqual(seen["approval_expires"], "Mon, 07 Feb 2050 00:35:23 GMT")
        self.assertRegex(seen["access_expires"], r"^\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$")
        del seen["access_expires"], seen["approval_expires"]
        self.assertEqual(seen, {
            "access_token": given["access_token"], "refresh_token": given["refresh_token"], "active": True,
            "client_id": "test-suite", "scope": given["scope"], "security_labels": [], "token_type": "Bearer",
            "username": "daniel-adams"})
        self.assertEqual(self.look(given["refresh_token"])["access_token"], given["access_token"])

    def test_an_expired_token_keeps_its_members(self) -> None:
        given = self.portal.issue_token()
        self.portal.advance(3601)
        self.assertEqual((self.look(given["access_token"])["active"], self.look(given["refresh_token"])["active"]),
                         (False, True))

    def test_an_unknown_token_is_just_inactive(self) -> None:
        self.assertEqual(self.look("nothing"), {"active": False})

    def test_the_token_parameter_is_required(self) -> None:
        self.assertIn("token", ask(self.portal.url + "/oauth/debug/introspect").json["error_description"])


# ######################################################################## the code flow, in a browser

class CodeFlow(PortalTest):
    """From the app's request to its tokens, through the pages."""

    def setUp(self) -> None:
        super().setUp()
        self.app, self.browser = App(self.portal), Browser(self.portal)

    def to_consent(self, patient_id: str = DANIEL) -> None:
        self.browser.open(self.app.authorize_url())
        self.browser.sign_in()
        self.browser.submit(patient_id)

    def test_sign_in_choose_approve_exchange_read(self) -> None:
        self.assertEqual(self.browser.open(self.app.authorize_url()).status, 200)
        self.assertIn("Sign in", self.browser.page.text)
        self.browser.sign_in()
        self.assertIn(f'data-patient-id="{AMY}"', self.browser.page.text)
        self.browser.submit(AMY)
        self.assertIn("Amy Shaw", self.browser.page.text)
        back = self.browser.submit("authorize")
        self.assertTrue(back.headers["location"].startswith("https://app.example/cb?own=1&"))
        self.assertEqual((back.location["state"], back.location["iss"]), (self.app.state, self.portal.url))
        tokens = self.app.exchange(back.location["code"])
        self.assertEqual((tokens.status, tokens.json["patient"]), (200, AMY))
        self.assertEqual(self.fhir(f"Patient/{AMY}", tokens.json).status, 200)

    def test_the_app_learns_of_a_refusal(self) -> None:
        self.to_consent()
        back = self.browser.submit("deny")
        self.assertEqual((back.location["error"], back.location["state"]), ("access_denied", self.app.state))

    def test_only_the_categories_left_checked_are_shared(self) -> None:
        self.to_consent()
        back = self.browser.submit("authorize", without="security_labels", security_labels="medications")
        tokens = self.app.exchange(back.location["code"]).json
        self.assertEqual(self.fhir(f"MedicationRequest?patient={DANIEL}", tokens).status, 200)
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", tokens).status, 403)
        self.assertNotIn("entry", self.fhir(f"Condition?patient={DANIEL}", tokens).json)

    def test_at_least_one_category_is_needed(self) -> None:
        self.to_consent()
        self.assertEqual(self.browser.submit("authorize", without="security_labels").status, 400)

    def test_the_end_date_bounds_every_token(self) -> None:
        self.to_consent()
        today = time.strftime("%Y-%m-%d", time.gmtime(self.portal.portal.clock.now()))
        back = self.browser.submit("authorize", approval_expires=today)
        tokens = self.app.exchange(back.location["code"]).json
        self.portal.advance(86400)
        self.assertEqual(self.app.refresh(tokens["refresh_token"]).json["error"], "invalid_grant")

    def test_an_end_date_in_the_past_or_too_far_is_refused(self) -> None:
        self.to_consent()
        for date in ("2020-01-01", "2999-01-01", "tomorrow", ""):
            with self.subTest(date=date):
                self.assertEqual(self.browser.submit("authorize", approval_expires=date).status, 400)
                self.browser.open(self.app.authorize_url())
                self.browser.submit(DANIEL)

    def test_a_record_that_is_not_the_users_is_refused(self) -> None:
        self.browser.open(self.app.authorize_url())
        self.browser.sign_in()
        self.assertEqual(self.browser.submit(DANIEL, patient_id=JOSEPH).status, 400)  # given twice
        page = self.browser.open(self.browser.url.partition("?")[0], "POST", [("patient_id", JOSEPH)])
        self.assertEqual(page.status, 403)

    def test_a_wrong_password_signs_nobody_in(self) -> None:
        self.browser.open(self.app.authorize_url())
        page = self.browser.sign_in(password="guess")
        self.assertEqual(page.status, 401)
        self.assertIn("do not match", page.text)

    def test_a_form_without_its_token_is_refused(self) -> None:
        self.to_consent()
        self.assertEqual(self.browser.submit("authorize", form_token="forged").status, 403)

    def test_a_request_is_answered_once(self) -> None:
        self.to_consent()
        page, url = self.browser.page, self.browser.url
        self.browser.submit("authorize")
        self.browser.page, self.browser.url = page, url
        self.assertEqual(self.browser.submit("authorize").status, 400)

    def test_the_session_gets_a_new_id_at_sign_in(self) -> None:
        self.browser.open(self.app.authorize_url())
        before = dict(self.browser.cookies)
        self.browser.sign_in()
        self.assertNotEqual(before, self.browser.cookies)

    def test_old_automation_finds_its_ids_and_attributes(self) -> None:
        self.browser.open(self.app.authorize_url())
        for needle in ('id="username"', 'id="password"', 'id="sign-in"', 'value="daniel-adams"',
                       'value="demo-password"'):
            self.assertIn(needle, self.browser.page.text)
        self.browser.sign_in()
        self.browser.submit(DANIEL)
        text = self.browser.page.text
        self.assertEqual(text.count('data-slide="next"'), 2)
        self.assertIn('id="consent-carousel"', text)
        form = Form(text)
        confirms = [one for one in form.inputs if one.get("rel") == "confirm"]
        self.assertTrue(confirms)
        for box in confirms:
            self.assertEqual((box["class"], box["type"], "required" in box, "value" in box),
                             ("glyphbox", "checkbox", True, False))
        labels = [one["value"] for one in form.inputs if one.get("name") == "security_labels"]
        self.assertIn("vital-signs", labels)
        self.assertLess(text.index("glyphbox"), text.index("security_labels"))
        until = next(one for one in form.inputs if one.get("name") == "approval_expires")
        self.assertTrue(until["type"] == "date" and until["min"] < until["value"] < until["max"])
        refusals = [one for one in form.buttons if one.get("class") == "btn-default"]
        self.assertTrue(refusals and all("formnovalidate" in one for one in refusals))
        self.assertIn("authorize", [one.get("id") for one in form.buttons])


class AuthorizationEndpoint(PortalTest):
    """What is wrong with a request is said before anybody signs in."""

    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal)

    def test_an_unknown_client_or_redirect_uri_is_a_page_and_no_redirect(self) -> None:
        for changed in ({"client_id": "nobody"}, {"client_id": None}, {"redirect_uri": "https://evil.example/"},
                        {"redirect_uri": None}, {"redirect_uri": self.app.redirect_uri + "/x"}):
            with self.subTest(changed=changed):
                got = ask(self.app.authorize_url(**changed))
                self.assertEqual(got.status, 400)
                self.assertNotIn("location", got.headers)

    def test_everything_else_goes_to_the_redirect_uri_with_the_state(self) -> None:
        for error, changed in (
                ("unsupported_response_type", {"response_type": "token"}), ("invalid_request", {"response_type": None}),
                ("invalid_request", {"scope": None}), ("invalid_scope", {"scope": "nonsense"}),
                ("invalid_request", {"aud": "https://other.example/fhir"}),
                ("invalid_request", {"code_challenge_method": "plain"}),
                ("invalid_request", {"code_challenge_method": None}), ("invalid_request", {"code_challenge": "short"})):
            with self.subTest(changed=changed):
                got = ask(self.app.authorize_url(**changed))
                self.assertEqual((got.status, got.location["error"]), (303, error))
                self.assertEqual(got.location["state"], self.app.state)

    def test_a_request_without_state_is_refused(self) -> None:
        self.assertEqual(ask(self.app.authorize_url(state=None)).location["error"], "invalid_request")

    def test_a_parameter_given_twice_is_refused(self) -> None:
        got = ask(self.app.authorize_url() + "&scope=patient/*.rs")
        self.assertEqual(got.location["error"], "invalid_request")

    def test_a_public_client_must_send_a_challenge(self) -> None:
        app = App(self.portal, token_endpoint_auth_method="none")
        got = ask(app.authorize_url(code_challenge=None, code_challenge_method=None))
        self.assertEqual(got.location["error"], "invalid_request")

    def test_the_request_may_come_as_a_form(self) -> None:
        url, _, query = self.app.authorize_url().partition("?")
        self.assertIn("/oauth/consent", ask(url, form=parse_qsl(query)).headers["location"])

    def test_the_apps_redirect_uri_is_never_unencoded_in_the_portals_addresses(self) -> None:
        self.assertNotIn("app.example", ask(self.app.authorize_url()).headers["location"])


class TokenEndpoint(PortalTest):
    """POST /oauth/token (RFC 6749)."""

    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal)

    def test_the_answer_is_not_cached_and_says_what_was_granted(self) -> None:
        got = self.app.exchange(self.app.code())
        self.assertEqual((got.headers["cache-control"], got.headers["pragma"]), ("no-store", "no-cache"))
        self.assertEqual((got.json["token_type"], got.json["expires_in"], got.json["scope"]),
                         ("Bearer", 3600, self.app.scope))

    def test_a_code_works_once_even_in_a_race_of_16(self) -> None:
        code, answers = self.app.code(), []  # type: str, list[int]
        gate = threading.Barrier(16)

        def run() -> None:
            gate.wait()
            answers.append(self.app.exchange(code).status)
        threads = [threading.Thread(target=run) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(answers), [200] + [400] * 15)

    def test_a_code_used_again_ends_what_it_gave(self) -> None:
        code = self.app.code()
        tokens = self.app.exchange(code).json
        self.assertEqual(self.app.exchange(code).json["error"], "invalid_grant")
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", tokens).status, 401)

    def test_a_code_lasts_a_minute(self) -> None:
        code = self.app.code()
        self.portal.advance(61)
        self.assertEqual(self.app.exchange(code).json["error"], "invalid_grant")

    def test_a_failed_exchange_uses_nothing_up(self) -> None:
        code = self.app.code()
        for changed in ({"code_verifier": "x" * 43}, {"redirect_uri": "https://app.example/other"},
                        {"code_verifier": ""}, {"redirect_uri": ""}):
            self.assertEqual(self.app.exchange(code, **changed).json["error"], "invalid_grant")
        self.assertEqual(App(self.portal).exchange(code).json["error"], "invalid_grant")
        self.assertEqual(self.app.exchange(code).status, 200)

    def test_a_client_authenticates_by_basic_or_post_and_never_both(self) -> None:
        form = {"grant_type": "authorization_code", "redirect_uri": self.app.redirect_uri,
                "code_verifier": self.app.verifier}
        url, secret = self.portal.url + "/oauth/token", self.app.secret
        posted = {"client_id": self.app.client_id, "client_secret": secret}
        self.assertEqual(ask(url, form={**form, **posted, "code": self.app.code()}).status, 200)
        both = ask(url, form={**form, **posted, "code": self.app.code()}, basic=(self.app.client_id, secret))
        self.assertEqual((both.status, both.json["error"]), (400, "invalid_request"))
        wrong = ask(url, form={**form, "code": self.app.code()}, basic=(self.app.client_id, "guess"))
        self.assertEqual((wrong.status, wrong.json["error"]), (401, "invalid_client"))
        self.assertTrue(wrong.headers["www-authenticate"].startswith("Basic"))

    def test_a_public_client_says_its_name_only(self) -> None:
        app = App(self.portal, token_endpoint_auth_method="none")
        tokens = app.exchange(app.code())
        self.assertEqual(tokens.status, 200)
        got = ask(self.portal.url + "/oauth/token",
                  form={"grant_type": "refresh_token", "refresh_token": tokens.json["refresh_token"]})
        self.assertEqual(got.status, 200, "a public client's refresh may leave out client_id")

    def test_refresh_tokens_rotate_and_earlier_access_tokens_live_on(self) -> None:
        first = self.app.tokens()
        second = self.app.refresh(first["refresh_token"]).json
        self.assertNotEqual(first["refresh_token"], second["refresh_token"])
        self.assertEqual(second["patient"], DANIEL)
        for tokens in (first, second):
            self.assertEqual(self.fhir(f"Patient/{DANIEL}", tokens).status, 200)

    def test_a_refresh_token_used_twice_ends_the_authorization(self) -> None:
        first = self.app.tokens()
        second = self.app.refresh(first["refresh_token"]).json
        self.assertEqual(self.app.refresh(first["refresh_token"]).json["error"], "invalid_grant")
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", second).status, 401)
        self.assertEqual(self.app.refresh(second["refresh_token"]).json["error"], "invalid_grant")

    def test_without_offline_access_there_is_no_refresh_token(self) -> None:
        self.assertNotIn("refresh_token", self.app.tokens(scope="launch/patient patient/*.rs"))

    def test_a_refresh_may_narrow_the_scope_and_never_widen_it(self) -> None:
        tokens = self.app.tokens()
        self.assertEqual(self.app.refresh(tokens["refresh_token"], scope="user/*.rs").json["error"], "invalid_scope")
        got = self.app.refresh(tokens["refresh_token"], scope="patient/Observation.rs").json
        self.assertEqual(got["scope"], "patient/Observation.rs")
        self.assertEqual(self.app.refresh(got["refresh_token"]).json["scope"], self.app.scope)

    def test_what_is_wrong_is_said_with_the_rfcs_code(self) -> None:
        for error, form in (("unsupported_grant_type", {"grant_type": "not_a_grant_type"}),
                            ("invalid_request", {}), ("invalid_request", {"grant_type": "refresh_token"}),
                            ("invalid_grant", {"grant_type": "refresh_token", "refresh_token": "nothing"})):
            with self.subTest(form=form):
                got = self.app.token_request(**form)
                self.assertEqual((got.status, got.json["error"]), (400, error))
                self.assertEqual(got.headers["cache-control"], "no-store")

    def test_get_is_405_and_json_415(self) -> None:
        got = ask(self.portal.url + "/oauth/token")
        self.assertEqual((got.status, "POST" in got.headers["allow"]), (405, True))
        self.assertEqual(self.post("/oauth/token", {"grant_type": "refresh_token"}).status, 415)


class AppsPage(PortalTest):
    """GET /apps and stopping to share (S4S)."""

    def setUp(self) -> None:
        super().setUp()
        self.app, self.browser = App(self.portal), Browser(self.portal)
        self.browser.open(self.portal.url + "/apps")
        self.browser.sign_in()

    def test_stopping_ends_the_apps_authorizations_for_that_patient_alone(self) -> None:
        first, second = self.app.tokens(), self.app.tokens()
        daughters, others = self.app.tokens(patient_id=AMY), App(self.portal).tokens()
        page = self.browser.open(self.portal.url + "/apps")
        self.assertEqual(page.text.count(f'rel="{self.app.client_id}"'), 2)  # a row for each patient
        rows = page.text.split("<tr rel=")[1:]
        daniels = next(place for place, row in enumerate(rows) if self.app.client_id in row and "Daniel Adams" in row)
        self.browser.submit("Stop sharing", form=daniels)
        self.assertIn('class="modal in"', self.browser.page.text)
        self.browser.submit("Stop sharing")
        for tokens, status in ((first, 401), (second, 401), (daughters, 200), (others, 200)):
            self.assertEqual(self.fhir(f"Patient/{tokens['patient']}", tokens).status, status)

    def test_anybody_elses_authorization_is_not_found(self) -> None:
        self.app.tokens(username="joseph-ross")
        self.browser.open(self.portal.url + "/apps")
        self.assertEqual(self.browser.submit("Sign out", form=0).status, 200)
        self.browser.open(self.portal.url + "/apps")
        self.browser.sign_in()
        grant = self.portal.portal.state.row("SELECT grant_id FROM grants WHERE username = 'joseph-ross'")
        assert grant
        token = dict(Form(self.browser.page.text).fields)["form_token"]
        got = self.browser.open(f"{self.portal.url}/revoke/{grant['grant_id']}", "POST", [("form_token", token)])
        self.assertEqual(got.status, 404)


class Introspection(PortalTest):
    """POST /oauth/introspect (RFC 7662) and /oauth/revoke (RFC 7009)."""

    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal)
        self.given = self.app.tokens()

    def look(self, about: str, **how: Any) -> Answer:
        how = how or {"basic": (self.app.client_id, self.app.secret)}
        return ask(self.portal.url + "/oauth/introspect", form={"token": about}, **how)

    def test_it_says_what_the_token_response_said(self) -> None:
        seen = self.look(self.given["access_token"]).json
        self.assertEqual((seen["active"], seen["scope"], seen["patient"], seen["client_id"], seen["token_type"]),
                         (True, self.given["scope"], DANIEL, self.app.client_id, "Bearer"))

    def test_an_unknown_or_expired_token_is_inactive_and_nothing_else(self) -> None:
        self.assertEqual(self.look("nothing").json, {"active": False})
        self.portal.advance(3601)
        self.assertEqual(self.look(self.given["access_token"]).json, {"active": False})

    def test_a_refresh_token_is_active_and_its_value_is_not_repeated(self) -> None:
        got = self.look(self.given["refresh_token"])
        self.assertTrue(got.json["active"])
        self.assertNotIn(self.given["refresh_token"], got.text)

    def test_a_stranger_is_refused(self) -> None:
        got = ask(self.portal.url + "/oauth/introspect", form={"token": self.given["access_token"]})
        self.assertEqual((got.status, got.json["error"]), (401, "invalid_client"))

    def test_a_token_may_ask_about_its_own_authorization(self) -> None:
        value = self.given["access_token"]
        self.assertTrue(self.look(value, token=value).json["active"])
        other = self.app.tokens()["access_token"]
        self.assertEqual(self.look(other, token=value).status, 401)

    def test_revoking_an_access_token_ends_it_alone(self) -> None:
        got = self.app.refresh(self.given["refresh_token"]).json
        self.revoke(got["access_token"])
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", got).status, 401)
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", self.given).status, 200)

    def test_revoking_a_refresh_token_ends_the_authorization(self) -> None:
        self.revoke(self.given["refresh_token"])
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", self.given).status, 401)

    def test_revoking_what_is_unknown_is_fine_and_anothers_token_stays(self) -> None:
        self.revoke("nothing")
        other = App(self.portal)
        ask(self.portal.url + "/oauth/revoke", form={"token": self.given["access_token"]},
            basic=(other.client_id, other.secret))
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", self.given).status, 200)

    def revoke(self, token: str) -> None:
        got = ask(self.portal.url + "/oauth/revoke", form={"token": token}, basic=(self.app.client_id, self.app.secret))
        self.assertEqual(got.status, 200)


# ######################################################################## the record

class FhirApi(PortalTest):
    """/api/fhir: one patient, and nothing else."""

    def test_without_a_token_it_is_401_without_an_error_code(self) -> None:
        got = self.fhir(f"Patient/{DANIEL}")
        self.assertEqual((got.status, got.headers["www-authenticate"]), (401, 'Bearer realm="s4s"'))
        self.assertEqual(got.json["resourceType"], "OperationOutcome")

    def test_a_bad_token_is_401_invalid_token(self) -> None:
        got = self.fhir(f"Patient/{DANIEL}", "nonsense")
        self.assertEqual(got.status, 401)
        self.assertIn('error="invalid_token"', got.headers["www-authenticate"])

    def test_too_small_a_scope_is_403_insufficient_scope(self) -> None:
        token = self.portal.issue_token(scope="patient/Observation.rs")
        got = self.fhir(f"Condition?patient={DANIEL}", token)
        self.assertEqual(got.status, 403)
        self.assertIn('error="insufficient_scope"', got.headers["www-authenticate"])

    def test_another_patients_resources_are_403(self) -> None:
        token = self.portal.issue_token(scope="patient/*.rs")
        for path in (f"Patient/{AMY}", "Condition/smart-Condition-119", f"Condition?patient={AMY}",
                     f"Condition?patient={DANIEL},{AMY}", f"Observation?subject=Patient/{AMY}", f"Patient?_id={AMY}"):
            with self.subTest(path=path):
                self.assertEqual(self.fhir(path, token).status, 403)

    def test_a_search_finds_the_tokens_patient_only(self) -> None:
        token = self.portal.issue_token(scope="patient/*.rs", patient_id=AMY)
        found = self.fhir("Condition?_count=100", token).json["entry"]
        self.assertEqual({entry["resource"]["subject"]["reference"] for entry in found}, {f"Patient/{AMY}"})

    def test_letters_of_a_v2_scope_count(self) -> None:
        only_read = self.portal.issue_token(scope="patient/Condition.r")
        self.assertEqual(self.fhir("Condition/smart-Condition-14", only_read).status, 200)
        self.assertEqual(self.fhir(f"Condition?patient={DANIEL}", only_read).status, 403)
        only_search = self.portal.issue_token(scope="patient/Condition.s")
        self.assertEqual(self.fhir("Condition/smart-Condition-14", only_search).status, 403)
        self.assertEqual(self.fhir(f"Condition?patient={DANIEL}", only_search).status, 200)

    def test_writing_is_refused_before_the_body_is_judged(self) -> None:
        token = self.portal.issue_token()
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            with self.subTest(method=method):
                self.assertEqual(self.fhir("Patient/x", method=method, body=b"{").status, 401)
                self.assertEqual(self.fhir("Patient/x", token, method=method, body=b"{").status, 403)

    def test_pages_lead_from_the_first_entry_to_the_last(self) -> None:
        token, url, seen = self.portal.issue_token(), f"Observation?category=laboratory&patient={DANIEL}", []
        while url:
            bundle = self.fhir(url, token).json
            seen += [entry["resource"]["id"] for entry in bundle["entry"]]
            url = next((link["url"][len(self.portal.fhir_url) + 1:] for link in bundle["link"]
                        if link["relation"] == "next"), "")
        self.assertGreater(len(seen), 20)
        self.assertEqual((len(seen), len(set(seen))), (bundle["total"], bundle["total"]))

    def test_post_search_is_the_same_search(self) -> None:
        token = self.portal.issue_token()
        got = self.fhir("Condition/_search", token, form={"patient": DANIEL, "code": "http://snomed.info/sct|48167000"})
        self.assertEqual([entry["resource"]["id"] for entry in got.json["entry"]], ["smart-Condition-14"])

    def test_an_unknown_parameter_is_named(self) -> None:
        got = self.fhir("Condition?colour=red", self.portal.issue_token())
        self.assertEqual(got.status, 400)
        self.assertIn("colour", got.json["issue"][0]["diagnostics"])

    def test_open_access_shows_everybodys_and_takes_no_writing(self) -> None:
        self.assertEqual(ask(f"{self.portal.open_fhir_url}/Patient?_count=50").json["total"], 3)
        self.assertEqual(ask(f"{self.portal.open_fhir_url}/Patient", data={}).status, 405)

    def test_me_tells_of_the_clients_tokens_but_not_their_values(self) -> None:
        given = self.portal.issue_token()
        got = ask(self.portal.url + "/api/me", token=given["access_token"])
        self.assertEqual((got.json["client_id"], got.json["tokens"][0]["patient"]), ("test-suite", DANIEL))
        self.assertNotIn(given["access_token"], got.text)

    def test_a_head_request_has_the_headers_of_get_and_no_body(self) -> None:
        token = self.portal.issue_token()
        got, head = self.fhir(f"Patient/{DANIEL}", token), self.fhir(f"Patient/{DANIEL}", token, method="HEAD")
        self.assertEqual((head.status, head.body), (200, b""))
        self.assertEqual(head.headers["content-length"], got.headers["content-length"])


# ######################################################################## the fixture

class Fixture(PortalTest):
    """s4s_proxy.Server, as tests use it."""

    def test_advance_moves_every_expiry(self) -> None:
        token = self.portal.issue_token()
        self.portal.advance(3599)
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", token).status, 200)
        self.portal.advance(1.5)
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", token).status, 401)

    def test_reset_leaves_nothing_of_what_was_made(self) -> None:
        client, token = self.portal.register_client(redirect_uris=["https://a.example/"]), self.portal.issue_token()
        now = self.portal.advance(10_000)
        self.portal.reset()
        self.assertLess(self.portal.portal.clock.now(), now)
        self.assertEqual(self.portal.requests, [])
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", token).status, 401)
        self.assertIsNone(self.portal.portal.client(client["client_id"]))

    def test_a_refused_control_says_why(self) -> None:
        with self.assertRaises(s4s.PortalError) as caught:
            self.portal.issue_token(username="nobody")
        self.assertEqual((caught.exception.status, caught.exception.error), (400, "invalid_request"))
        self.assertIn("nobody", caught.exception.description)

    def test_approve_gives_the_redirect_errors_too(self) -> None:
        app = App(self.portal)
        self.assertIn("error=invalid_scope", self.portal.approve(app.authorize_url(scope="x"), "daniel-adams"))
        self.assertIn("error=access_denied", self.portal.approve(app.authorize_url(), "daniel-adams", deny=True))

    def test_approve_raises_where_a_browser_would_be_left_on_a_page(self) -> None:
        app = App(self.portal)
        hows: tuple[dict[str, Any], ...] = (
            {"url": app.authorize_url(client_id="nobody")}, {"patient_id": JOSEPH}, {"username": "nobody"},
            {"security_labels": ["nonsense"]}, {"security_labels": []}, {"approval_expires": "never"},
            {"url": "https://elsewhere.example/oauth/authorize"}, {"url": self.portal.url + "/login"})
        for how in hows:
            with self.subTest(how=how), self.assertRaises(s4s.PortalError):
                self.portal.approve(**{"url": app.authorize_url(), "username": "daniel-adams", **how})

    def test_fail_makes_the_next_request_fail(self) -> None:
        app = App(self.portal)
        code = app.code()
        self.portal.fail("token", error="invalid_grant")
        self.assertEqual(app.exchange(code).json["error"], "invalid_grant")
        self.assertEqual(app.exchange(code).status, 200)

    def test_faults_queue_and_some_last(self) -> None:
        self.portal.fail("metadata", status=503, retry_after=7)
        self.portal.fail("metadata", status=500, times=None)
        first = self.fhir("metadata")
        self.assertEqual((first.status, first.headers["retry-after"]), (503, "7"))
        self.assertEqual([self.fhir("metadata").status for _ in range(3)], [500] * 3)
        self.portal.reset()
        self.assertEqual(self.fhir("metadata").status, 200)

    def test_a_dropped_connection_has_no_answer(self) -> None:
        self.portal.fail("discovery", drop=True)
        with self.assertRaises((http.client.HTTPException, OSError)):
            ask(f"{self.portal.fhir_url}/.well-known/smart-configuration")

    def test_an_authorization_error_travels_to_the_app(self) -> None:
        app = App(self.portal)
        self.portal.fail("authorize", error="temporarily_unavailable")
        self.assertIn("error=temporarily_unavailable", self.portal.approve(app.authorize_url(), "daniel-adams"))

    def test_requests_show_what_the_app_sent_and_repr_hides_secrets(self) -> None:
        app = App(self.portal)
        app.tokens()
        seen = self.portal.requests[-1]
        self.assertEqual((seen.method, seen.path, seen.status, seen.client_id),
                         ("POST", "/oauth/token", 200, app.client_id))
        self.assertIn(app.verifier, seen.body)
        self.assertNotIn(app.verifier, repr(seen))
        self.assertNotIn(seen.headers["authorization"], repr(seen))
        self.assertIn("authorization_code", repr(seen))
        self.assertNotIn(app.verifier, ask(self.portal.url + "/oauth/debug/requests").text)

    def test_two_servers_know_nothing_of_each_other(self) -> None:
        with s4s.Server() as other:
            token = other.issue_token()["access_token"]
            self.assertEqual(self.fhir(f"Patient/{DANIEL}", token).status, 401)

    def test_stop_leaves_nothing_and_is_safe_twice(self) -> None:
        before = threading.active_count()
        server = s4s.Server().start()
        ask(server.url + "/health")
        server.stop()
        server.stop()
        self.assertEqual(threading.active_count(), before)
        with self.assertRaises(OSError):
            ask(server.url + "/health")

    def test_a_server_can_be_started_again(self) -> None:
        server = s4s.Server()
        for _ in range(2):
            with server:
                self.assertEqual(ask(server.url + "/health").status, 200)

    def test_state_outlives_a_server_with_a_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "state.db")
            with s4s.Server(db=path) as server:
                token = server.issue_token()["access_token"]
            with s4s.Server(db=path) as server:
                self.assertEqual(ask(f"{server.fhir_url}/Patient/{DANIEL}", token=token).status, 200)


class Drift(PortalTest):
    """Each control has two doors; they must not drift apart."""

    def test_methods_and_http_take_the_same_names_and_defaults(self) -> None:
        for name, function in s4s.CONTROLS.items():
            with self.subTest(control=name):
                method = getattr(s4s.Server, name)
                code = method.__code__
                names = code.co_varnames[1:code.co_argcount + code.co_kwonlyargcount]
                self.assertEqual(sorted(names), sorted(s4s.parameters_of(function)))
                defaults = dict(zip(names[len(names) - len(method.__defaults__ or ()):], method.__defaults__ or ()))
                defaults.update(method.__kwdefaults__ or {})
                if name == "issue_token":  # the one difference: see the contract of the two doors
                    self.assertEqual((defaults.pop("client_id"), defaults.pop("username")),
                                     ("test-suite", "daniel-adams"))
                self.assertEqual(defaults, function.__kwdefaults__ or {})

    def test_every_setting_is_an_option_and_a_keyword(self) -> None:
        options = {action.dest for action in s4s.build_parser()._actions} - {"help", "version"}
        self.assertEqual(options, {one.name for one in dataclasses.fields(s4s.Settings)})


# ######################################################################## HTTP

class Sockets(PortalTest):
    """What comes over a raw socket."""

    def send(self, data: bytes) -> bytes:
        """Send bytes, read until the server closes."""
        with socket.create_connection((self.portal.host, self.portal.port), 10) as connection:
            connection.sendall(data)
            answer = b""
            while True:
                more = connection.recv(65536)
                answer += more
                if not more:
                    return answer

    def status(self, data: bytes) -> int:
        return int(self.send(data).split(b" ", 2)[1])

    def host(self) -> bytes:
        return f"Host: {self.portal.host}:{self.portal.port}\r\n".encode()

    def test_malformed_requests_are_refused_and_closed(self) -> None:
        for status, data in (
                (400, b"nonsense\r\n\r\n"), (505, b"GET / HTTP/2.0\r\n\r\n"), (400, b"GET / HTTP/1.1\r\n\r\n"),
                (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost : a\r\n\r\n"),
                (400, b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n"),
                (421, b"GET http://other.example/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"), (431, b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000),
                (414, b"GET /" + b"x" * 70_000), (400, b"GET relative HTTP/1.1\r\nHost: a\r\n\r\n"),
                (400, b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n"), (400, b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
                (421, b"GET / HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")):
            with self.subTest(data=data[:60]):
                self.assertEqual(self.status(data), status)

    def test_both_framings_at_once_are_refused(self) -> None:
        self.assertEqual(self.status(b"POST /oauth/token HTTP/1.1\r\n" + self.host() + b"Content-Length: 3\r\n"
                                     b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 400)

    def test_a_chunked_body_is_understood(self) -> None:
        got = self.send(b"POST /oauth/token HTTP/1.1\r\n" + self.host() + b"Connection: close\r\nTransfer-Encoding: "
                        b"chunked\r\nContent-Type: application/x-www-form-urlencoded\r\n\r\n"
                        b"c;x=y\r\ngrant_type=n\r\n3\r\none\r\n0\r\n\r\n")
        self.assertIn(b"unsupported_grant_type", got)

    def test_a_body_over_the_limit_is_413_and_closed(self) -> None:
        self.assertEqual(self.status(b"POST /oauth/token HTTP/1.1\r\n" + self.host()
                                     + b"Content-Length: 1048577\r\n\r\n"), 413)

    def test_a_body_is_read_even_when_nobody_wants_it(self) -> None:
        got = self.send(b"POST /nothing HTTP/1.1\r\n" + self.host() + b"Content-Length: 5\r\n\r\nhello"
                        b"GET /health HTTP/1.1\r\n" + self.host() + b"Connection: close\r\n\r\n")
        self.assertIn(b"404 Not Found", got)
        self.assertIn(b'"status": "ok"', got)

    def test_expect_100_continue_is_answered(self) -> None:
        got = self.send(b"POST /oauth/token HTTP/1.1\r\n" + self.host() + b"Expect: 100-continue\r\nConnection: close"
                        b"\r\nContent-Length: 4\r\n\r\na=bc")
        self.assertTrue(got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 415"))

    def test_an_absolute_request_target_is_served(self) -> None:
        self.assertEqual(self.status(f"GET {self.portal.url}/health HTTP/1.1\r\nHost: x\r\nConnection: close"
                                     "\r\n\r\n".encode()), 200)


class Bugs(PortalTest):
    """A bug of ours is a 500 in words, and its log shows no value."""

    def test_the_log_names_the_place_and_no_secret(self) -> None:
        lines: list[str] = []

        def broken(portal: s4s.Portal, request: s4s.Request) -> s4s.Response:
            raise RuntimeError("the secret is demo-secret-s4s")
        route = s4s._EXACT["/oauth/token"]
        s4s._EXACT["/oauth/token"] = route._replace(endpoint=broken)
        self.addCleanup(s4s._EXACT.__setitem__, "/oauth/token", route)
        self.portal.portal.log = lines.append
        got = ask(self.portal.url + "/oauth/token", form={"a": "b"})
        self.assertEqual((got.status, got.json["error"]), (500, "server_error"))
        self.assertIn("RuntimeError", lines[0])
        self.assertNotIn("demo-secret-s4s", lines[0])


# ######################################################################## the command line

class CommandLine(unittest.TestCase):
    """python s4s_proxy.py"""

    def run_main(self, *argv: str) -> tuple[int, str, str]:
        """Run main in this thread; give exit status, standard output, standard error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = s4s.main(argv)
            except SystemExit as exit_:
                status = int(exit_.code or 0)
        return status, out.getvalue(), err.getvalue()

    def test_the_first_line_is_the_address_and_sigint_ends_it_well(self) -> None:
        heard: list[Answer] = []

        class Out(io.StringIO):
            def write(self, text: str) -> int:
                if text.startswith("http"):
                    heard.append(ask(text + "/health"))
                    signal.raise_signal(signal.SIGINT)
                return super().write(text)
        out, err = Out(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.assertEqual(s4s.main(["--port", "0"]), 0)
        self.assertEqual(heard[0].json["status"], "ok")
        self.assertRegex(out.getvalue(), r"^http://127\.0\.0\.1:\d+\n$")
        for needle in ("daniel-adams", "demo-password", "open-fhir", "FOR TESTING ONLY", "GET /health 200"):
            self.assertIn(needle, err.getvalue())

    def test_as_a_process_of_its_own(self) -> None:
        process = subprocess.Popen([sys.executable, str(HERE / "s4s_proxy.py"), "--port", "0", "--quiet"],
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        with process:
            try:
                assert process.stdout
                url = process.stdout.readline().strip()
                self.assertEqual(ask(url + "/health").status, 200)
            finally:
                process.terminate()
            self.assertEqual(process.wait(10), 0 if os.name == "posix" else 1)

    def test_a_bad_option_is_exit_status_2(self) -> None:
        self.assertEqual(self.run_main("--nonsense")[0], 2)

    def test_a_start_that_fails_is_one_line_and_exit_status_1(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            status, out, err = self.run_main("--port", str(taken.getsockname()[1]))
        self.assertEqual((status, out, err.count("\n")), (1, "", 1))
        for argv in (["--client", "nonsense"], ["--base-url", "nonsense"], ["--db", "/nonexistent/x.db"],
                     ["--certfile", "/nonexistent"], ["--client", "a=javascript:x"], ["--port", "99999"]):
            with self.subTest(argv=argv):
                status, out, err = self.run_main("--port", "0", *argv)
                self.assertEqual((status, out, err.count("\n")), (1, "", 1))

    def test_version(self) -> None:
        self.assertEqual(self.run_main("--version"), (0, s4s.__version__ + "\n", ""))


# ######################################################################## pages

class Page(html.parser.HTMLParser):
    """What a checker looks at in a page: its elements with their attributes, their text, and which are in a label."""
    VOID = ("input", "br", "hr", "meta", "link")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.labelled: list[dict[str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if "label" in self.open:
            self.labelled.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def all(self, name: str) -> list[dict[str, str]]:
        """The attributes of every element of this name."""
        return [attributes for tag, attributes in self.elements if tag == name]


class Pages(PortalTest):
    """What is true of every page a person sees."""
    pages: ClassVar[dict[str, Answer]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.pages = dict(cls.every_page())

    @classmethod
    def every_page(cls) -> Iterator[tuple[str, Answer]]:
        """Each page of the portal, by name: both before and after signing in, errors too."""
        url, browser = cls.portal.url, Browser(cls.portal)
        app = App(cls.portal, scope="openid fhirUser launch/patient launch/encounter patient/*.rs offline_access")
        for path in ("/", "/demo", "/launch", "/nothing", "/oauth/authorize?client_id=nobody"):
            yield path, browser.open(url + path)
        yield "sign in", browser.open(app.authorize_url())
        yield "wrong password", browser.sign_in(password="guess")
        yield "picker", browser.sign_in()
        yield "consent", browser.submit(DANIEL)
        browser.submit("authorize")
        yield "apps", browser.open(url + "/apps")
        yield "stop sharing", browser.submit("Stop sharing")
        yield "home", browser.open(url + "/")
        clinician = Browser(cls.portal)
        clinician.open(app.authorize_url())
        yield "clinician's picker", clinician.sign_in("clinician")

    def test_each_page_can_be_read_by_everybody(self) -> None:
        for name, got in self.pages.items():
            with self.subTest(page=name):
                page = Page(got.text)
                self.assertTrue(got.text.startswith("<!doctype html>"))
                self.assertEqual(page.all("html"), [{"lang": "en"}])
                self.assertTrue(page.texts["title"][0].strip())
                self.assertIn({"name": "viewport", "content": "width=device-width, initial-scale=1"}, page.all("meta"))
                for landmark in ("h1", "header", "nav", "main", "footer"):
                    self.assertEqual(len(page.all(landmark)), 1, landmark)
                for field in page.all("input") + page.all("select") + page.all("textarea"):
                    self.assertTrue(field.get("type") == "hidden" or field in page.labelled, field)
                for number, text in enumerate(page.texts.get("button", [])):
                    self.assertTrue(text.strip() or "hidden" in page.all("button")[number])
                ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
                self.assertEqual(len(ids), len(set(ids)))

    def test_each_page_says_that_this_is_a_test_server(self) -> None:
        for name, got in self.pages.items():
            with self.subTest(page=name):
                self.assertIn("test server with made-up patients", Page(got.text).texts["footer"][0])

    def test_no_page_loads_anything_or_opens_a_dialog(self) -> None:
        for name, got in self.pages.items():
            with self.subTest(page=name):
                page = Page(got.text)
                for tag, attributes in page.elements:
                    self.assertNotIn(tag, ("link", "img", "iframe", "object", "embed", "base"))
                    self.assertFalse({"src", "style"} & attributes.keys(), attributes)
                    self.assertFalse([one for one in attributes if one.startswith("on")], attributes)
                self.assertNotRegex("".join(page.texts["style"]), r"url\(|@import")
                self.assertNotRegex("".join(page.texts.get("script", [])), r"\b(alert|confirm|prompt)\(|innerHTML\b[^ ]")

    def test_each_page_runs_its_own_script_and_style_and_no_other(self) -> None:
        for name, got in self.pages.items():
            with self.subTest(page=name):
                policy = dict(one.strip().partition(" ")[::2] for one in
                              got.headers["content-security-policy"].split(";"))
                page = Page(got.text)
                for directive, element in (("style-src", "style"), ("script-src", "script")):
                    hashes = " ".join("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"
                                      for text in page.texts.get(element, []))
                    self.assertEqual(policy.get(directive, ""), hashes)
                self.assertEqual((policy["default-src"], policy["base-uri"], policy["frame-ancestors"]), ("'none'",) * 3)
                self.assertNotIn("form-action", policy)
                self.assertEqual(got.headers["referrer-policy"], "no-referrer")
                self.assertEqual(got.headers["cache-control"], "no-store")

    def test_names_and_scopes_are_text_wherever_they_come_from(self) -> None:
        evil = "<script>alert(1)</script>&\"'"
        app = App(self.portal, client_name=evil, scope="launch/patient patient/Observation.rs?code=<b>&status=final")
        with self.portal.portal.state.transaction() as database:
            database.execute("UPDATE users SET name = ?", (evil,))
            database.execute("UPDATE patients SET name = ?", (evil,))
        browser = Browser(self.portal)
        pages = [browser.open(f"{self.portal.url}/oauth/authorize?client_id={quote(evil)}"),
                 browser.open(app.authorize_url()), browser.sign_in(), browser.submit(DANIEL)]
        browser.submit("authorize")
        pages += [browser.open(self.portal.url + "/apps"), browser.submit("Stop sharing"),
                  browser.open(self.portal.url + "/"), browser.open(self.portal.url + "/launch")]
        for got in pages:
            self.assertIn("&lt;script&gt;", got.text)
            self.assertNotIn("<script>alert", got.text)
            self.assertNotIn("<b>", got.text)


class ConsentPage(PortalTest):
    """What the person who decides is told, and what scripts click."""

    def consent(self, scope: str = "launch/patient patient/*.rs offline_access", **metadata: Any) -> Page:
        self.browser = Browser(self.portal)
        self.browser.open(App(self.portal, scope=scope, **metadata).authorize_url())
        self.browser.sign_in()
        return Page(self.browser.submit(DANIEL).text)

    def test_it_says_who_asks_for_whose_data_and_where_they_go(self) -> None:
        main = self.consent(client_name="My app").texts["main"][0]
        for words in ("My app", "the health record of Daniel Adams", "https://app.example", "Until the end of", "stop"):
            self.assertIn(words, main)
        self.assertIn({"href": "/apps"}, Page(self.browser.page.text).all("a"))

    def test_it_warns_of_everything_and_of_coming_back(self) -> None:
        main = self.consent().texts["main"][0]
        self.assertIn("Everything means every kind of data", main)
        self.assertIn("while you are away", main)
        main = self.consent("launch/patient patient/Observation.rs").texts["main"][0]
        self.assertNotIn("Everything means every kind of data", main)
        self.assertNotIn("while you are away", main)

    def test_a_constraint_and_what_a_type_covers_are_said_in_words(self) -> None:
        main = self.consent("launch/patient patient/Observation.rs?category=laboratory").texts["main"][0]
        self.assertIn("but only where category is laboratory", main)
        self.assertIn("laboratory results", main)

    def test_each_category_comes_with_a_sentence(self) -> None:
        self.assertEqual(list(s4s.CATEGORY_WORDS), list(s4s.CATEGORIES))
        main = self.consent().texts["main"][0]
        for label, (name, _) in s4s.CATEGORIES.items():
            self.assertIn(name + s4s.CATEGORY_WORDS[label], main)

    def test_the_steps_are_those_that_scripts_know(self) -> None:
        page = self.consent()
        first, second, third = self.browser.page.text.partition("</main>")[0].split("<section")[1:]
        self.assertIn("btn-default", first)  # one may refuse at once
        self.assertEqual([step.count("glyphbox") > 0 for step in (first, second, third)], [False, True, False])
        self.assertEqual([step.count('data-slide="next"') for step in (first, second, third)], [1, 1, 0])
        self.assertEqual([text for text, one in zip(page.texts["button"], page.all("button"))
                          if one.get("data-slide") == "next"], ["Continue", "Continue"])
        self.assertEqual(len([one for one in page.all("form") if one.get("id") == "consent-carousel"]), 1)
        self.assertTrue(all(one.get("formnovalidate") == "" for one in page.all("button") if one.get("value") == "deny"))

    def test_enter_in_a_field_presses_nothing(self) -> None:
        self.assertIn("disabled", self.consent().all("button")[0])  # a form's first button is what Enter presses

    def test_the_confirmations_are_not_sent(self) -> None:
        self.assertTrue(all("name" not in one for one in self.consent().all("input") if one.get("rel") == "confirm"))


class PickerPage(PortalTest):
    """Whose record, when there are many."""

    def setUp(self) -> None:
        super().setUp()
        with self.portal.portal.state.transaction() as database:
            database.executemany("INSERT INTO patients (username, patient_id, name, is_user) VALUES ('joseph-ross', ?, ?, 0)",
                                 [(f"p-{number}", f"Child {number}") for number in range(40)])
        self.browser = Browser(self.portal)
        self.browser.open(App(self.portal).authorize_url())
        self.browser.sign_in("joseph-ross")

    def test_many_patients_come_with_a_search(self) -> None:
        page = Page(self.browser.page.text)
        self.assertEqual(len([one for one in page.all("button") if "data-patient-id" in one]), s4s.MANY_PATIENTS)
        self.assertIn("of 41 patients", page.texts["main"][0])
        found = Page(self.browser.submit("Search", q="child 37").text)
        self.assertEqual([one["data-patient-id"] for one in found.all("button") if "data-patient-id" in one], ["p-37"])
        self.browser.submit("p-37", form=1)
        self.assertIn("the health record of Child 37", self.browser.page.text)

    def test_a_search_that_finds_nobody_can_be_changed(self) -> None:
        page = Page(self.browser.submit("Search", q="<nobody>").text)
        self.assertIn("is called '<nobody>'", page.texts["main"][0])
        self.assertIn("<nobody>", [one.get("value") for one in page.all("input")])


class ErrorPage(PortalTest):
    """What was expected, what came, and what to read."""

    def test_it_says_what_was_expected_what_came_and_what_to_read(self) -> None:
        got = ask(f"{self.portal.url}/oauth/authorize?client_id=demo-app&redirect_uri=http://x.example/")
        main = Page(got.text).texts["main"][0]
        self.assertIn(f"{self.portal.url}/demo", main)
        self.assertIn("redirect_uri = http://x.example/", main)
        self.assertIn({"href": "https://www.rfc-editor.org/rfc/rfc6749#section-4.1.1"}, Page(got.text).all("a"))

    def test_no_form_field_is_shown(self) -> None:
        got = ask(self.portal.url + "/login", form={"username": "daniel-adams", "password": "do not show"})
        self.assertEqual(got.status, 403)
        self.assertNotIn("do not show", got.text)


class StartPage(PortalTest):
    """GET /"""

    def test_it_names_every_endpoint_and_its_text(self) -> None:
        main = Page(ask(self.portal.url + "/").text).texts["main"][0]
        for one in s4s.ROUTES:
            self.assertIn(one.path.replace("{}", "..."), main)
            self.assertIn(one.spec, main)

    def test_its_links_lead_somewhere(self) -> None:
        for link in Page(ask(self.portal.url + "/").text).all("a"):
            if link["href"].startswith("/"):
                with self.subTest(link=link["href"]):
                    self.assertIn(ask(self.portal.url + link["href"]).status, (200, 303, 400, 401))

    def test_it_says_what_is_open_to_anyone(self) -> None:
        self.assertIn("tokens for any account", ask(self.portal.url + "/").text)
        with s4s.Server(debug=False, open_fhir=False) as closed:
            text = ask(closed.url + "/").text
            for needle in ("tokens for any account", "every record, at", "/oauth/debug", "/api/open-fhir", "/launch"):
                self.assertNotIn(needle, text)

    @unittest.skipUnless(os.name == "posix" and shutil.which("curl"), "needs a shell and curl")
    def test_its_commands_work_when_pasted(self) -> None:
        commands = Page(ask(self.portal.url + "/").text).texts["pre"][0]
        done = subprocess.run(["sh", "-c", commands], capture_output=True, timeout=30, check=True)
        self.assertEqual(json.loads(done.stdout)["id"], DANIEL)

    def test_it_is_the_home_of_who_is_signed_in(self) -> None:
        browser = Browser(self.portal)
        browser.open(self.portal.url + "/login")
        browser.sign_in()
        page = Page(browser.open(self.portal.url + "/").text)
        self.assertIn("Daniel Adams, Amy Shaw", page.texts["main"][0])
        self.assertNotIn("Welcome", browser.submit("Sign out").text)


class DemoApp(PortalTest):
    """GET /demo, and the client that it is."""

    def test_it_is_a_public_client_like_any_other(self) -> None:
        app = App(self.portal)
        app.client_id, app.secret, app.redirect_uri = "demo-app", "", self.portal.url + "/demo"
        app.scope = "openid fhirUser launch/patient patient/*.rs offline_access"
        back = self.portal.approve(app.authorize_url(redirect_uri=app.redirect_uri), "daniel-adams", AMY)
        self.assertTrue(back.startswith(app.redirect_uri + "?"))
        tokens = app.exchange(dict(parse_qsl(urlsplit(back).query))["code"]).json
        self.assertEqual((tokens["patient"], tokens["scope"]), (AMY, app.scope))
        self.assertIn("refresh_token", tokens)

    def test_it_needs_pkce(self) -> None:
        app = App(self.portal)
        app.client_id = "demo-app"
        back = ask(app.authorize_url(redirect_uri=self.portal.url + "/demo", code_challenge=None))
        self.assertEqual(back.location["error"], "invalid_request")

    def test_an_ehr_launch_leads_to_it(self) -> None:
        url = self.portal.launch(client_id="demo-app", patient_id=AMY)
        self.assertTrue(url.startswith(self.portal.url + "/demo?"))
        self.assertEqual(ask(url).status, 200)

    def test_it_talks_to_this_server_alone(self) -> None:
        policy = ask(self.portal.url + "/demo").headers["content-security-policy"]
        self.assertIn("connect-src 'self';", policy)
        self.assertNotIn("http", policy)

    def test_it_knows_the_servers_public_name(self) -> None:
        with s4s.Server(base_url="https://smart.example/s4s") as behind:
            page = Page(ask(f"{behind.address}/demo").text)
            self.assertIn("https://smart.example/s4s", [one.get("data-base") for one in page.all("div")])
            self.assertIn({"href": "/s4s/apps"}, page.all("a"))

    def test_its_steps_cite_their_texts(self) -> None:
        for text in ("RFC 8414", "RFC 7636", "RFC 6749 section 4.1.1", "RFC 9207", "RFC 6749 section 4.1.3",
                     "RFC 6750", "RFC 6749 section 6", "RFC 7009", "OpenID Connect Core"):
            self.assertIn(text, s4s.DEMO_SCRIPT)


# ######################################################################## promises about the repository

class Repository(unittest.TestCase):
    """What the repository itself promises."""

    def test_every_route_names_its_text_and_says_what_it_does(self) -> None:
        for route in s4s.ROUTES:
            self.assertTrue(route.spec and route.endpoint.__doc__, route)


if __name__ == "__main__":
    unittest.main()
