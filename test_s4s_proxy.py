"""Tests of s4s_proxy.py: a real server, real sockets, one behaviour a test. python -m unittest runs all of
them, python -m unittest test_s4s_proxy.TokenEndpoint one endpoint's."""
from __future__ import annotations

import ast
import base64
import calendar
import collections
import concurrent.futures
import contextlib
import datetime
import doctest
import functools
import gc
import gzip
import hashlib
import html.parser
import http.client
import http.server
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
import unittest
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest import mock
from urllib.parse import parse_qsl, quote, quote_plus, unquote_plus, urlencode, urljoin, urlsplit

import s4s_proxy as s4s

HERE = Path(__file__).resolve().parent
DANIEL, AMY, JOSEPH = "smart-1288992", "smart-1032702", "smart-1081332"
TEST_SUITE = ("test-suite", "demo-secret-s4s")


# ######################################################################## helpers: client, app, browser

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
        basic: tuple[str, str] | None = None, token: Any = "", headers: Any = None) -> Answer:
    """One request, redirects not followed: `form` is sent as a form, `data` as JSON, `body` as it is; `token`
    is a token response, or a token."""
    parts, sent = urlsplit(url), dict(headers or {})
    if form is not None:
        body = urlencode(form).encode()
        sent.setdefault("Content-Type", "application/x-www-form-urlencoded")
    elif data is not None:
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        sent.setdefault("Content-Type", "application/json")
    if basic:
        sent["Authorization"] = "Basic " + base64.b64encode(":".join(basic).encode()).decode()
    if token:
        sent["Authorization"] = "Bearer " + (token["access_token"] if isinstance(token, dict) else token)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
    try:
        connection.request(method or ("GET" if body is None else "POST"),
                           (parts.path or "/") + ("?" + parts.query if parts.query else ""), body, sent)
        got = connection.getresponse()
        return Answer(got.status, got.getheaders(), got.read())
    finally:
        connection.close()


class Page(html.parser.HTMLParser):
    """What stands in a page: its elements, their attributes and text, and those in a label."""
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

    def all(self, name: str, /, **wanted: str) -> list[dict[str, str]]:
        """The attributes of every element of this name, of those that have the wanted ones."""
        return [held for tag, held in self.elements if tag == name and wanted.items() <= held.items()]

    @property
    def main(self) -> str:
        """The text between header and footer."""
        return self.texts["main"][0]

    def patients(self) -> list[str]:
        return [button["data-patient-id"] for button in self.all("button") if "data-patient-id" in button]


class Form:
    """A form of a page: its method, its action, its buttons, and what it would send untouched."""
    def __init__(self, text: str, index: int = 0):
        page = Page(text)
        starts, end = [at for at, (tag, _) in enumerate(page.elements) if tag == "form"], len(page.elements)
        start, end = [*starts, end, end][index:index + 2]
        (_, form), *inside = page.elements[start:end] or [("form", {})]  # a page may have none
        self.method, self.action = form.get("method", "get"), form.get("action", "")
        self.inputs = [attributes for tag, attributes in inside if tag == "input"]
        self.fields = [(field["name"], field.get("value", "")) for field in self.inputs
                       if "name" in field and (field.get("type") != "checkbox" or "checked" in field)]
        buttons = zip(page.all("button"), page.texts.get("button", []))
        self.buttons = [{**button, "text": text} for button, text in buttons
                        if "form" in button or ("button", button) in inside]


class Browser:
    """What a person uses: cookies, links, forms. It follows redirects, but stops at the app's."""
    def __init__(self, portal: s4s.Server):
        self.portal, self.url, self.page = portal, portal.url, Answer(0, [], b"")
        self.cookies: dict[str, str] = {}

    @property
    def headers(self) -> dict[str, str]:
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return {"Cookie": cookies} if cookies else {}

    def ask(self, url: str, headers: Any = None, **how: Any) -> Answer:
        """One request, with the cookies; those that the answer brings are kept."""
        answer = ask(url, headers={**self.headers, **(headers or {})}, **how)
        for cookie in answer.cookies:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    def open(self, url: str, method: str = "GET", fields: list[tuple[str, str]] | None = None) -> Answer:
        """Go to a URL; the answer is that of the last page, or the redirect that leaves the portal."""
        for _ in range(10):
            self.url = url
            self.page = self.ask(url, method=method, form=fields if method == "POST" else None)
            target = urljoin(url, self.page.headers.get("location", ""))
            if self.page.status not in (302, 303) or not target.startswith(self.portal.url):
                return self.page
            url, method, fields = target, "GET", None
        raise AssertionError("redirects without end")

    def submit(self, button: str = "", form: int = 0, without: str = "", **changed: str) -> Answer:
        """Submit a form of the page by a button (its id, value or text), with fields changed or left out."""
        sent = Form(self.page.text, form)
        fields = [(name, changed.pop(name, value)) for name, value in sent.fields if name != without]
        fields += list(changed.items())
        if button:
            pressed = next(shown for shown in sent.buttons if button in (
                shown.get("id"), shown.get("value"), shown.get("data-patient-id")) or button in shown["text"])
            fields += [(pressed["name"], pressed.get("value", ""))] if "name" in pressed else []
        url = urljoin(self.url, sent.action)
        if sent.method.lower() == "post":
            return self.open(url, "POST", fields)
        return self.open(url + "?" + urlencode(fields))

    def sign_out(self) -> Answer:
        """Press the button in the page's head; its form is the last."""
        return self.submit("Sign out", form=self.page.text.count("<form") - 1)

    def sign_in(self, username: str = "daniel-adams", password: str = "demo-password") -> Answer:
        """Fill in the sign-in page, opened if none is."""
        if 'id="sign-in"' not in self.page.text:
            self.open(self.portal.url + "/login")
        return self.submit("sign-in", username=username, password=password)


class App:
    """A small SMART app: it asks for authorization and exchanges codes."""
    redirect_uri = "https://app.example/cb?own=1"
    choices = frozenset(("encounter_id", "security_labels", "approval_expires", "access_lifetime"))

    def __init__(self, portal: s4s.Server, scope: str = "launch/patient patient/*.rs offline_access",
                 known: tuple[str, str] | None = None, **metadata: Any):
        """`known`: id and secret of an app that is registered already."""
        metadata = {"redirect_uris": [self.redirect_uri], "scope": scope, **metadata}
        self.portal, self.scope, self.redirect_uri = portal, scope, metadata["redirect_uris"][0]
        given: Any = {} if known else portal.register_client(**metadata)
        pair: tuple[str, str] = known or (given["client_id"], given.get("client_secret", ""))
        self.client_id, self.secret = pair
        self.verifier = secrets.token_urlsafe(48)
        self.state = "s;t a/t+e%7E~"

    def authorize_url(self, **changed: str | None) -> str:
        """The address the app sends the browser to; None leaves a parameter out."""
        challenge = b64(hashlib.sha256(self.verifier.encode()).digest())
        fields: dict[str, str | None] = {
            "response_type": "code", "client_id": self.client_id, "redirect_uri": self.redirect_uri,
            "scope": self.scope, "state": self.state, "aud": self.portal.fhir_url,
            "code_challenge": challenge, "code_challenge_method": "S256", **changed}
        return f"{self.portal.url}/oauth/authorize?" + urlencode(
            {name: value for name, value in fields.items() if value is not None})

    def code(self, username: str = "daniel-adams", patient_id: str | None = None, **changed: Any) -> str:
        """A code that a user approved; what isn't one of the user's choices changes the request."""
        chosen = {name: changed.pop(name) for name in self.choices & changed.keys()}
        back = self.portal.approve(self.authorize_url(**changed), username, patient_id, **chosen)
        return query_of(back)["code"]

    def token_request(self, **form: str) -> Answer:
        url = f"{self.portal.address}/oauth/token"
        if self.secret:
            return ask(url, form=form, basic=(self.client_id, self.secret))
        return ask(url, form={"client_id": self.client_id, **form})

    def exchange(self, code: str, **changed: str) -> Answer:
        return self.token_request(**{"grant_type": "authorization_code", "code": code,
            "redirect_uri": self.redirect_uri, "code_verifier": self.verifier, **changed})

    def refresh(self, refresh_token: str, **changed: str) -> Answer:
        return self.token_request(grant_type="refresh_token", refresh_token=refresh_token, **changed)

    def tokens(self, username: str = "daniel-adams", **approved: Any) -> Any:
        """The whole flow."""
        return self.exchange(self.code(username, **approved)).json


def log_of(portal: s4s.Server) -> list[str]:
    """What a portal logs from now on."""
    lines: list[str] = []
    portal.portal.log = lambda *told: lines.append("\n".join(told))
    return lines


class Test(unittest.TestCase):
    """A test that may enter contexts, as Python 3.11's may."""
    def during(self, context: Any) -> Any:
        """Enter a context until the test ends."""
        self.addCleanup(context.__exit__, None, None, None)
        return context.__enter__()


def doing(place: Any, name: str, before: Callable[[], object] = bool,
          after: Callable[[], object] = bool) -> Any:
    """Let something else be done just before or after a function, on its way."""
    real = getattr(place, name)

    def both(*given: Any) -> Any:
        before()
        got = real(*given)
        after()
        return got
    return mock.patch.object(place, name, both)


class PortalTest(Test):
    """A class of tests has one server, reset before each test."""
    settings: ClassVar[dict[str, Any]] = {}
    portal: s4s.Server

    @classmethod
    def setUpClass(cls) -> None:
        cls.portal = s4s.Server(**cls.settings).start()
        cls.addClassCleanup(cls.portal.stop)

    def setUp(self) -> None:
        self.portal.reset()

    def fhir(self, path: str, token: Any = "", **how: Any) -> Answer:
        return ask(f"{self.portal.fhir_url}/{path}", token=token, **how)

    def at(self, path: str, **how: Any) -> Answer:
        return ask(self.portal.url + path, **how)

    def post(self, path: str, data: Any, **how: Any) -> Answer:
        return self.at(path, data=data, **how)

    def is_error(self, got: Answer, error: str = "invalid_grant", status: int = 400, words: str = "") -> None:
        self.assertEqual((got.status, got.json.get("error")), (status, error), got)
        self.assertIn(words, got.json["error_description"])

    def serve_instead(self, path: str, endpoint: Callable[[Any, s4s.Request], s4s.Response]) -> None:
        """Put another endpoint at a path, for this test."""
        routes = s4s._routes_by_path()[0]
        self.during(mock.patch.dict(routes, {path: routes[path]._replace(endpoint=endpoint)}))


# ######################################################################## helpers: bytes over a socket

class RawTest(PortalTest):
    """Bytes over a raw socket, and what comes back."""
    def talk(self, data: bytes, end: bool = False) -> list[Answer]:
        """Send bytes, read until the server closes: the answers. end: say that no more will come."""
        with socket.create_connection((self.portal.host, self.portal.port), 10) as connection:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return self.answers(connection)

    def statuses(self, data: bytes, end: bool = False) -> list[int]:
        return [answer.status for answer in self.talk(data, end)]

    @staticmethod
    def answers(connection: socket.socket) -> list[Answer]:
        """What a connection still brings, until it is closed."""
        answers: list[Answer] = []
        with connection.makefile("rb") as stream:
            for line in iter(stream.readline, b""):
                lines = iter(lambda: stream.readline().decode("latin-1").rstrip("\r\n"), "")
                headers = [(name, value) for name, _, value in (text.partition(": ") for text in lines)]
                length = int(dict(headers).get("Content-Length", 0))
                answers.append(Answer(int(line.split()[1]), headers, stream.read(length)))
        return answers

    def request(self, line: str, *headers: str, body: bytes = b"", close: bool = True) -> bytes:
        """A request as bytes, with the Host header."""
        lines = [f"{line} HTTP/1.1", f"Host: {self.portal.host}:{self.portal.port}", *headers]
        return "\r\n".join([*lines, *(["Connection: close"] if close else []), "", ""]).encode() + body

    def form(self, *headers: str, body: bytes = b"") -> bytes:
        """A form for the token endpoint as bytes."""
        form = "Content-Type: application/x-www-form-urlencoded"
        return self.request("POST /oauth/token", form, *headers, body=body)

    def limits(self, **seconds: float) -> None:
        """Shorter waits than the server's own, for this test."""
        for name, value in seconds.items():
            self.during(mock.patch.object(self.portal._listener, name, value))


# ######################################################################## helpers: keys

def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


# RFC 7515 appendix A.2: the key's two primes, and what is signed.
RFC_7515_KEY = s4s.RsaKey(*(int.from_bytes(base64.urlsafe_b64decode(text + "=="), "big") for text in (
    ("4BzEEOtIpmVdVEZNCqS7baC4crd0pqnRH_5IB3jw3bcxGn6QLvnEtfdUdiYrqBdss1l58BQ3KhooKeQTa9AB0Hw_Py5PJdTJNPY8cQ"
     "n7ouZ2KKDcmnPGBY5t7yLc1QlQ5xHdwW1VhvKn-nXqhJTBgIPgtldC-KDV5z-y2XDwGUc"),
    ("uQPEfgmVtjL0Uyyx88GZFF1fOunH3-7cepKmtH4pxhtCoHqpWmT8YAmZxaewHgHAjLYsp1ZSe7zFYHj7C6ul7TjeLQeZD_YwD66t62"
     "wDmpe_HlB-TnBA-njbglfIsRLtXlnDzQkv5dTltRJ11BKBBypeeF6689rjcJIDEz9RWdc"))))
RFC_7515_INPUT = (
    b"eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9p"
    b"c19yb290Ijp0cnVlfQ")
RFC_7515_SIGNATURE = (
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdb"
    "F9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383"
    "LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWy"
    "wlVmtVrBp0igcN_IoypGlUPQGe77Rw")
RSA_JWK = {**{name: RFC_7515_KEY.public_jwk()[name] for name in ("kty", "n", "e")}, "kid": "r"}

# RFC 6979 appendix A.2.6: private key x and public key U of P-384, and the signature of "sample" (SHA-384).
RFC_6979_X = int(
    "6B9D3DAD2E1B8C1C05B19875B6659F4DE23C3B667BF297BA9AA47740787137D896D5724E4C70A825F872C9EA60D2EDF5", 16)
RFC_6979_JWK = {"kty": "EC", "crv": "P-384", "kid": "e", "x": b64(bytes.fromhex(
    "EC3A4E415B4E19A4568618029F427FA5DA9A8BC4AE92E02E06AAE5286B300C64DEF8F0EA9055866064A254515480BC13")),
    "y": b64(bytes.fromhex(
        "8015D9B72D7D57244EA8EF9AC0C621896708A59367F9DFB9F54CA84B3F1C9DB1288B231C3AE0D4FE7344FD2533264720"))}
RFC_6979_SIGNATURE = bytes.fromhex(
    "94EDBB92A5ECB8AAD4736E56C691916B3F88140666CE9FA73D64C4EA95AD133C81A648152E44ACF96E36DD1E80FABE46"
    "99EF4AEB15F178CEA1FE40DB2603138F130E740A19624526203B6351D0A3A94FA329C145786E679E7B82C71A38628AC8")


def es384_sign(message: bytes) -> bytes:
    """An ECDSA signature with the key of RFC 6979 (which says how to draw k better than this does)."""
    k, point, power = 0x1234567, (1, 1, 0), s4s.P384_G
    for bit in range(k.bit_length()):
        point = s4s._add(point, power) if k >> bit & 1 else point
        power = s4s._double(power)
    r = point[0] * pow(point[2], -2, s4s.P384_P) % s4s.P384_P % s4s.P384_N
    hashed = int.from_bytes(hashlib.sha384(message).digest(), "big")
    s = pow(k, -1, s4s.P384_N) * (hashed + r * RFC_6979_X) % s4s.P384_N
    return r.to_bytes(48, "big") + s.to_bytes(48, "big")


class KeyedApp:
    """An app that proves itself by its keys (private_key_jwt); `known`: the id of one that is registered."""
    def __init__(self, portal: s4s.Server, known: str = "", **metadata: Any):
        keys = {} if "jwks_uri" in metadata else {"jwks": {"keys": [RSA_JWK, RFC_6979_JWK]}}
        self.portal = portal
        self.client_id = known or portal.register_client(**{"token_endpoint_auth_method": "private_key_jwt",
            "grant_types": ["client_credentials"], "scope": "system/*.rs", **keys, **metadata})["client_id"]

    def assertion(self, algorithm: str = "RS384", header: Any = None, **changed: Any) -> str:
        """A signed assertion, as of the portal's time; None leaves a claim out."""
        claims = {"iss": self.client_id, "sub": self.client_id, "aud": self.portal.url + "/oauth/token",
                  "exp": self.portal.portal.clock.now() + 300, "jti": secrets.token_urlsafe(8), **changed}
        kid = {"RS384": "r", "ES384": "e"}.get(algorithm)
        head = {"alg": algorithm, "kid": kid, "typ": "JWT", **(header or {})}
        def part(members: dict[str, Any]) -> str:
            given = {name: value for name, value in members.items() if value is not None}
            return b64(json.dumps(given).encode())
        signed = f"{part(head)}.{part(claims)}"
        if algorithm == "ES384":
            return f"{signed}.{b64(es384_sign(signed.encode()))}"
        return f"{signed}.{b64(s4s.rsa_sign(RFC_7515_KEY, 'RS384', signed.encode()))}"

    def token(self, assertion: str = "", headers: Any = None, path: str = "token", **changed: str) -> Answer:
        """A request of the token endpoint, or another, as a backend service."""
        form = {"grant_type": "client_credentials", "client_assertion": assertion or self.assertion(),
                "client_assertion_type": s4s.ASSERTION_TYPE, "scope": "system/*.rs", **changed}
        return ask(f"{self.portal.address}/oauth/{path}", headers=headers, form=form)


# ######################################################################## helpers: a FHIR server

class FhirServer(http.server.ThreadingHTTPServer):
    """A FHIR server that can't be trusted: it answers each search with all it has, whatever was asked, and
    `script` makes it worse (path -> status, headers, body; or raw bytes, then the end unless keeps_open)."""
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FhirHandler)
        self.script: dict[str, tuple[int, dict[str, str], bytes] | bytes] = {}
        self.records: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, dict[str, str], bytes]] = []   # target, headers, body
        self.keeps_open = False
        self.writers: list[Any] = []   # of the connections, oldest first
        self.port = self.server_port
        self.url = f"http://127.0.0.1:{self.port}/fhir"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.005,), daemon=True)
        self.thread.start()

    def handle_error(self, *args: Any) -> None:
        """The portal went away, on purpose."""

    def answer(self, target: str) -> tuple[int, dict[str, str], bytes] | bytes:
        path = target.partition("?")[0].removeprefix("/fhir/")
        _, sent, body = self.seen[-1]
        writes = sent.get("content-type", "").endswith(("fhir+json", "json+fhir"))
        for key in (f"{sent[':method']} {path}",) if writes else (target, path):
            if key in self.script:
                return self.script[key]
        if writes:
            return self.store(path, json.loads(body))
        if path in self.records:
            return json_answer(self.records[path], ETag='W/"7"')
        if path == "metadata":
            return json_answer({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        if "/" in path and not path.endswith(("/_search", "$everything")):
            return json_answer({"resourceType": "OperationOutcome"}, 404)
        return json_answer(self.bundle(*self.records.values()))

    def store(self, path: str, resource: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Take a write, whatever it is."""
        status, name = (200, path) if "/" in path else (201, f"{path}/new-{len(self.records)}")
        self.records[name] = resource = {**resource, "id": name.rpartition("/")[2]}
        return json_answer(resource, status, ETag='W/"8"', Location=f"{self.url}/{name}/_history/8",
                           **{"Last-Modified": "Thu, 31 May 2018 22:48:43 GMT"})

    def bundle(self, /, *resources: dict[str, Any], **links: str) -> dict[str, Any]:
        entries = [{"fullUrl": f"{self.url}/{resource['resourceType']}/{resource.get('id')}",
                    "resource": resource} for resource in resources]
        return {"resourceType": "Bundle", "type": "searchset", "total": len(resources), "entry": entries,
                "link": [{"relation": name, "url": url} for name, url in links.items() if url]}

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class FhirHandler(http.server.BaseHTTPRequestHandler):
    """A connection to that server."""
    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    server: FhirServer

    def setup(self) -> None:
        super().setup()
        self.server.writers.append(self.wfile)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()} | {":method": self.command}
        self.server.seen.append((self.path, headers, body))
        answer = self.server.answer(self.path)
        if isinstance(answer, bytes):
            self.wfile.write(answer)
            self.close_connection = not self.server.keeps_open
        else:
            status, given, text = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **given}.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
        self.wfile.flush()
    do_POST = do_PUT = do_GET


def json_answer(value: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], bytes]:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {"Content-Type": "application/fhir+json", **headers}, text


ME, OTHER = DANIEL, "somebody-else"
# Types that name a patient in DSTU2 and a subject from STU3 on; ImagingStudy and MeasureReport do from R4 on.
MOVED = ("ClinicalImpression Condition Encounter MedicationAdministration MedicationDispense "
         "MedicationStatement")


def to(name: Any) -> dict[str, Any]:
    return {"reference": name}


def made(name: str, /, **more: Any) -> dict[str, Any]:
    """A resource of a Type, or as Type/id."""
    type_name, _, key = name.partition("/")
    return {"resourceType": type_name, **({"id": key} if key else {}), **more}


def bundle_of(*resources: Any) -> dict[str, Any]:
    return made("Bundle", type="collection", entry=[{"resource": resource} for resource in resources])


def observation(name: str, patient: str = ME, **more: Any) -> dict[str, Any]:
    mine = {"status": "final", "code": {"text": "x"}, "subject": to(f"Patient/{patient}")}
    return made(f"Observation/{name}", **{**mine, **more})


def document(name: str, patient: str, url: str) -> dict[str, Any]:
    return made(f"DocumentReference/{name}", status="current", subject=to(f"Patient/{patient}"),
                content=[{"attachment": {"url": url}}])


def next_of(page: dict[str, Any]) -> str:
    """A Bundle's link to the next page; "" on the last."""
    return next((str(link["url"]) for link in page["link"] if link["relation"] == "next"), "")


def pages_from(url: str, token: str = "", **how: Any) -> Iterator[dict[str, Any]]:
    """The pages from an address to the last, by their links."""
    while url:
        page = ask(url, token=token, **how).json
        yield page
        url, how = next_of(page), {}


def within(page: Any, mode: str = "") -> list[dict[str, Any]]:
    return [each["resource"] for each in page.get("entry", []) if not mode or each["search"]["mode"] == mode]


def ids_within(page: Any, mode: str = "") -> list[str]:
    return [resource["id"] for resource in within(page, mode)]


OPENLY: dict[str, Any] = {"token": "", "api": "/api/open-fhir/"}


class RecordTest(PortalTest):
    """A portal, and a token for one record; or for none, to use where everybody may read."""
    scope, api = "patient/*.rs", "/api/fhir/"

    def setUp(self) -> None:
        super().setUp()
        self.token = self.issue(self.scope) if self.scope else ""

    def issue(self, scope: str, **more: Any) -> str:
        return str(self.portal.issue_token(scope=scope, **more)["access_token"])

    def get(self, path: str, *, api: str = "", token: Any = None, **how: Any) -> Answer:
        """One request of the FHIR API, with the token for my record unless told otherwise."""
        url = self.portal.url + (api or self.api) + path
        return ask(url, token=self.token if token is None else token, **how)

    def assert_statuses(self, token: Any, expected: Mapping[str, int]) -> None:
        for path, status in expected.items():
            with self.subTest(path=path):
                self.assertEqual(self.get(path, token=token).status, status)

    def read(self, path: str, **how: Any) -> dict[str, Any]:
        """The JSON of a request that must succeed."""
        got = self.get(path, **how)
        self.assertEqual(got.status, 200, got)
        return dict(got.json)

    def ids(self, path: str, **how: Any) -> list[str]:
        return ids_within(self.read(path, **how))

    def assert_refused(self, path: str, status: int = 403, *words: str, **how: Any) -> Answer:
        got = self.get(path, **how)
        self.assertEqual((got.status, got.json["resourceType"]), (status, "OperationOutcome"), got)
        for word in words:
            self.assertIn(word, got.json["issue"][0]["diagnostics"])
        return got

    def write(self, path: str, resource: Any, token: str = "", **headers: str) -> Answer:
        """Create a resource, or update the one at a path, with a token that may write in my record."""
        body = resource if isinstance(resource, bytes) else json.dumps(resource).encode()
        return self.get(path, method="PUT" if "/" in path else "POST", body=body,
                        token=token or self.issue("patient/*.crus"),
                        headers={"Content-Type": "application/fhir+json", **headers})


class ForwardingTest(RecordTest):
    """A portal in front of a FHIR server that can't be trusted, and a token for one record."""
    behind: FhirServer

    @property
    def upstream(self) -> s4s.Upstream:
        records = self.portal.portal.records
        assert isinstance(records, s4s.ForwardedRecords)
        return records.upstream

    @classmethod
    def setUpClass(cls) -> None:
        cls.behind = FhirServer()
        cls.addClassCleanup(cls.behind.stop)
        cls.settings = {"fhir_server": cls.behind.url + "/", "fhir_header": "X-Api-Key: swordfish",
                        "fhir_timeout": 5, "open_fhir": True}
        super().setUpClass()

    def setUp(self) -> None:
        super().setUp()
        self.behind.script.clear()
        self.assertEqual(self.portal.portal.records.version, "r4")  # which the first request would ask for
        self.behind.seen.clear()
        url = self.behind.url
        self.behind.records = {f"{resource['resourceType']}/{resource['id']}": resource for resource in (
            made(f"Patient/{ME}"), made(f"Patient/{OTHER}"), observation("mine"),
            observation("theirs", OTHER), made("Practitioner/dr"),
            document("my-doc", ME, f"{url}/Binary/my-file"),
            document("their-doc", OTHER, f"{url}/Binary/their-file"),
            *(made(f"Binary/{who}-file", contentType="text/plain", data="aGk=") for who in ("my", "their")))}

    def assert_refused(self, path: str, status: int = 403, *words: str, **how: Any) -> Answer:
        """It is refused, and the FHIR server's address is not told."""
        got = super().assert_refused(path, status, *words, **how)
        self.assertNotIn(str(self.behind.port), got.text)
        return got

    def assert_not_forwarded(self, path: str, status: int = 403, **how: Any) -> None:
        self.assert_refused(path, status, **how)
        self.assertEqual(self.behind.seen, [])

    def script(self, /, path: str, value: Any, status: int = 200, headers: Any = None, **links: str) -> None:
        """What the FHIR server answers at a path; resources in a list are a searchset, with these links."""
        body = self.behind.bundle(*value, **links) if isinstance(value, list) else value
        self.behind.script[path] = json_answer(body, status, **(headers or {}))


# ######################################################################## 3 scopes

class ScopeWords(unittest.TestCase):
    """One grammar for SMART 1, SMART 2 and constraints."""
    def test_hundreds_of_constraints_or_scopes_are_compared_in_no_time(self) -> None:
        head = "patient/Observation.rs?"
        joined = ["&".join(f"code={number}" for number in range(800)),
                  "&".join(f"code={number},{number + 1}" for number in range(500)),
                  "category=a&" + "&".join(f"code={number}" for number in range(700)) + "&status=final"]
        many = " ".join(f"{head}category=a&code={number}" for number in range(170))
        long = [head + constraints for constraints in joined]
        for granted, wanted in ((long[0], long[0]), (long[1], long[1]), (long[0][:4023], long[0]),
                                (long[2], long[2]), (many, many),
                                (many, many.replace("=a&", "=a&status=x&")[:8000])):
            with self.subTest(granted[-30:]):
                begun = time.thread_time()
                wanted = wanted.rpartition(" ")[0] or wanted
                self.assertEqual(s4s.negotiate_scope(wanted, granted), wanted)
                self.assertLess(time.thread_time() - begun, 0.15)  # it was a second and more

    def test_what_a_scope_means_and_what_is_none(self) -> None:
        many = "patient/Observation.rs?category=laboratory,http://x%7Cvital-signs&status=final"
        for word, meaning in (("patient/*.rs", ("patient", "*", "rs", ())),
                ("user/Condition.read", ("user", "Condition", "rs", ())),
                ("system/*.*", ("system", "*", "cruds", ())),
                ("patient/Patient.write", ("patient", "Patient", "cud", ())),
                (many, ("patient", "Observation", "rs", (
                    ("category", "laboratory,http://x|vital-signs"), ("status", "final"))))):
            self.assertEqual(s4s.parse_scope(word), (*meaning[:3], word, meaning[3]), word)
        for word in ("patient/*.", "patient/*.dus", "patient/*.sr", "Patient/*.rs", "patient/observation.rs",
                     "patient/*", "patient/*.rs?", "patient/*.rs?x", "patient/*.rs?x=", "patient/*.rs?a=b&",
                     "launch/patient", "patient/*.rs?code:in=x", "patient/*.rs?subject.name=x",
                     "patient/*.rs?_filter=x", "patient/*.readx"):
            self.assertIsNone(s4s.parse_scope(word), word)

    def test_a_registered_scope_bounds_by_meaning_and_letter_by_letter(self) -> None:
        for registered, word, covered in (
                ("patient/*.read", "patient/Observation.rs", "rs"), ("patient/*.rs", "patient/*.read", "rs"),
                ("patient/*.rs", "patient/*.cruds", "rs"), ("patient/Observation.rs", "patient/*.rs", ""),
                ("patient/*.r", "patient/*.rs", "r"), ("patient/*.rs", "user/*.rs", ""),
                ("user/*.rs", "patient/*.rs", ""), ("launch/patient", "launch", "launch"),
                ("launch", "launch/patient", ""), ("fhirUser", "profile", "profile"), ("", "openid", ""),
                ("patient/*.rs patient/Goal.c patient/Goal.u", "patient/Goal.cruds", "crus"),
                ("patient/*.rs patient/Goal.cu", "patient/*.cruds", "rs"),
                ("patient/*.write", "patient/Goal.crud", "cud"), ("patient/*.cu", "patient/*.read", ""),
                ("patient/*.rs", "patient/Observation.rs?category=laboratory", "rs"),
                ("patient/Observation.rs?category=laboratory", "patient/Observation.rs", ""),
                ("patient/Observation.rs?category=a,b", "patient/Observation.rs?status=c&category=b", "rs"),
                ("patient/Observation.rs?category=a", "patient/Observation.rs?category=a,b", ""),
                ("patient/Observation.rs?category=a", "patient/Observation.rs?code=a", ""),
                ("patient/Observation.rs?category=a%5C,b", "patient/Observation.rs?category=b", "")):
            self.assertEqual(s4s.covered(registered, word), covered, (registered, word))

    def test_what_is_granted(self) -> None:
        everything = " ".join([*s4s.PLAIN_SCOPES, "patient/*.cruds user/*.cruds system/*.cruds"])
        for asked, granted in (("patient/*.rs openid launch/patient", "patient/*.rs openid launch/patient"),
                ("openid patient/*.read openid", "openid patient/*.read"), ("patient/*.*", "patient/*.*"),
                ("user/Condition.cruds?code=x", "user/Condition.crus?code=x"), ("patient/*.d", ""),
                ("patient/*.write user/Goal.ud", "patient/*.write user/Goal.u"), ("system/*.rs", ""),
                ("patient/*.r patient/*.cd", "patient/*.r patient/*.c"), ("online_access", ""),
                ("nonsense patient/*.dus launch/imagingstudy fhirUser", "fhirUser")):
            self.assertEqual(s4s.negotiate_scope(asked, everything), granted, asked)
        self.assertEqual(s4s.negotiate_scope("openid offline_access", "patient/*.rs openid"), "openid")
        for registered, granted in (("rs", "rs read"), ("read", "rs read"), ("r", "r"), ("c", "c"),
                                    ("cu", "cu write"), ("*", "crus * write"), ("crs", "crs read")):
            asked = "patient/*.cruds patient/*.* patient/*.write"
            self.assertEqual(s4s.negotiate_scope(asked, f"patient/*.{registered}"),
                             " ".join(f"patient/*.{suffix}" for suffix in granted.split()), registered)
        system = s4s.negotiate_scope("system/*.* patient/*.rs openid system/Goal.cu", everything, ("system",))
        self.assertEqual(system, "system/*.read")


# ######################################################################## 4 the tables and the clock

class Stores(Test):
    """The tables, and what is remembered of them."""
    def test_what_was_looked_up_is_remembered_within_bounds_until_something_is_written(self) -> None:
        store = self.during(contextlib.closing(s4s.Store(None, "CREATE TABLE IF NOT EXISTS t (a INTEGER)")))
        self.assertIsNone(store.row("SELECT a FROM t"))
        for number in range(3):
            with store.transaction() as database:
                database.execute("INSERT INTO t VALUES (?)", (number,))
            rows = store.rows("SELECT a FROM t")
            self.assertEqual([row["a"] for row in rows], list(range(number + 1)))
            self.assertIs(store.rows("SELECT a FROM t"), rows)
        long = "x" * s4s.MAX_KNOWN_OF_ONE
        self.assertIsNot(store.rows("SELECT ?", long), store.rows("SELECT ?", long))
        for number in range(300):
            store.row("SELECT ?", f"{number}" + "x" * 40_000)
            size = sum(len(text) for key in store._known for text in key)
            self.assertLess(size, s4s.MAX_KNOWN + s4s.MAX_KNOWN_OF_ONE)


class Clocks(PortalTest):
    """Whatever clock and zone the machine has."""
    @staticmethod
    def system_clock(seconds: float) -> Any:
        return mock.patch.object(time, "time", lambda: seconds)

    def test_a_system_clock_set_back_brings_nothing_back(self) -> None:
        now, app, service = time.time(), App(self.portal), KeyedApp(self.portal)
        code, assertion, short = app.code(), service.assertion(), self.portal.issue_token(access_lifetime=60)
        self.assertEqual(service.token(assertion).status, 200)
        with self.system_clock(now + 400):
            self.assertEqual(self.fhir("Patient", short).status, 401)
            self.assertEqual(service.token().status, 200)  # forgets the first assertion, which has expired
        with self.system_clock(now - 7200):
            self.assertGreaterEqual(self.portal.portal.clock.now(), now + 400)
            self.assertEqual(self.fhir("Patient", short).status, 401)
            self.assertEqual(service.token(assertion).status, 401)
            self.is_error(app.exchange(code))
            token = self.portal.issue_token()
            self.assertEqual(self.fhir("Patient", token).status, 200)
        with self.system_clock(now - 7200 + 3601):
            self.assertEqual(self.fhir("Patient", token).status, 401)

    def test_at_no_moment_of_a_reset_is_a_token_good_that_has_expired(self) -> None:
        asker, see, seen = App(self.portal, known=TEST_SUITE), "/oauth/debug/introspect?token=", list[Any]()

        def expired() -> str:
            token = self.portal.issue_token(scope="openid patient/*.rs", access_lifetime=10)["access_token"]
            self.portal.advance(11)
            return str(token)
        doors: list[Callable[[str], None]] = [
            lambda value: seen.append(self.fhir("Patient", value).status),
            lambda value: seen.append(self.at("/oauth/userinfo", token=value).status),
            lambda value: seen.append(introspected(asker, value)["active"]),
            lambda value: seen.append(self.at(see + value).json["active"])]
        for look in doors:
            value = expired()
            with doing(s4s, "known_token", after=self.portal.reset):
                look(value)
            just_before = functools.partial(look, expired())
            with doing(self.portal.portal.state, "transaction", before=just_before):
                self.portal.reset()
        self.assertEqual(seen, [401] * 4 + [False] * 4)
        self.assertLess(self.portal.portal.clock.now(), time.time() + 5)

    def to(self, *date: int) -> None:
        """Advance the portal to a moment, UTC."""
        self.portal.advance(calendar.timegm((*date, 0, 0, 0)[:6]) - self.portal.portal.clock.now())

    def test_the_end_date_bounds_every_token_and_a_leap_day_is_a_day_like_others(self) -> None:
        self.to(2028, 2, 29, 23, 59, 50)
        app, browser = App(self.portal), signed_in(self.portal)
        browser.open(app.authorize_url())
        browser.submit(DANIEL)
        [date] = [field for field in Form(browser.page.text).inputs if field.get("type") == "date"]
        self.assertEqual([date[name] for name in ("min", "value", "max")],
                         ["2028-02-29", "2029-02-28", "2030-02-28"])
        for day, status in (("2028-02-28", 400), ("2029-02-29", 400), ("2030-03-01", 400),
                            ("2030-02-28", 303), ("2028-02-29", 303)):
            with self.subTest(day=day):
                browser.open(app.authorize_url())
                browser.submit(DANIEL)
                self.assertEqual(browser.submit("authorize", approval_expires=day).status, status)
        tokens = app.exchange(browser.page.location["code"]).json
        self.assertLessEqual(tokens["expires_in"], 10)
        self.to(2028, 3, 1)
        self.assertEqual(self.fhir("Patient", tokens).status, 401)
        self.assertEqual(app.refresh(tokens["refresh_token"]).json["error"], "invalid_grant")

    def test_the_clock_goes_as_far_as_dates_can_be_written(self) -> None:
        self.to(9989, 1, 1)
        tokens = App(self.portal).tokens()
        self.assertEqual(self.fhir("Patient", tokens).status, 200)
        got = self.at(f"/oauth/debug/introspect?token={tokens['access_token']}")
        self.assertTrue(got.json["approval_expires"].endswith("9990 23:59:59 GMT"))
        for seconds in (366 * 86400, 1e11, -1e12):
            with self.subTest(seconds=seconds), self.assertRaisesRegex(s4s.PortalError, "seconds"):
                self.portal.advance(seconds)

    @unittest.skipUnless(hasattr(time, "tzset"), "Windows has no time.tzset")
    def test_dates_are_utc_wherever_the_machine_is(self) -> None:
        self.addCleanup(time.tzset)  # after the zone is restored
        for zone in ("Asia/Tokyo", "America/New_York", "UTC", "Pacific/Apia"):
            with self.subTest(zone=zone), mock.patch.dict(os.environ, {"TZ": zone}):
                time.tzset()
                self.assertEqual((s4s.day_of(0), s4s.end_of_day("1970-01-01"), s4s.http_date(0)),
                                 ("1970-01-01", 86399.0, "Thu, 01 Jan 1970 00:00:00 GMT"))
                self.assertEqual(s4s.date_range("2026-03-29T02:30:00Z")[0], 1774751400.0)
                token = self.portal.issue_token()
                self.assertEqual(self.fhir("Observation?date=2008-08-13", token).status, 200)


@contextlib.contextmanager
def started(*options: str, program: Iterable[str] = ("s4s_proxy.py",)) -> Iterator[Any]:
    """The program as a process of its own, and its address; ended with the block if it runs still."""
    with subprocess.Popen([sys.executable, *program, "--port", "0", "--quiet", *options], cwd=HERE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline().strip()
        finally:
            process.terminate()


@contextlib.contextmanager
def together(count: int, action: Callable[[], object]) -> Iterator[None]:
    """Threads that all do something, begun before the block and waited for after it."""
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        for _ in range(count):
            threads.submit(action)
        yield


class Durability(Test):
    """With --db, what was acknowledged stays."""
    def setUp(self) -> None:
        self.path = os.path.join(self.during(tempfile.TemporaryDirectory()), "state.db")

    @unittest.skipUnless(os.name == "posix", "needs SIGKILL")
    def test_kill_9_under_load_loses_nothing_that_was_acknowledged(self) -> None:
        acknowledged, enough = list[str](), threading.Event()
        with started("--db", self.path) as (process, url):
            def register() -> None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    while True:
                        got = ask(url + "/oauth/register", data={"redirect_uris": ["https://app.example/cb"]})
                        acknowledged.append(got.json["client_id"])
                        if len(acknowledged) >= 40:
                            enough.set()
            with together(4, register):
                came = enough.wait(60)
                process.kill()
        self.assertTrue(came)
        with s4s.Server(db=self.path) as portal:
            for client_id in acknowledged:
                self.assertIsNotNone(portal.portal.client(client_id))

    @unittest.skipUnless(os.name == "posix", "needs SIGKILL")
    def test_what_an_app_wrote_outlives_kill_9_and_the_same_data_and_ends_with_a_reset(self) -> None:
        loaded, data = Path(self.path + ".json"), observation("loaded", status="final")
        loaded.write_text(json.dumps(data))
        options, path = ("--db", self.path, "--data", str(loaded)), "Observation/loaded"
        with started(*options) as (process, url):
            body = {"client_id": "test-suite", "username": "daniel-adams", "scope": "patient/*.crus"}
            token = ask(url + "/oauth/debug/token", data=body).json["access_token"]
            new = ask(f"{url}/api/fhir/Observation", data=observation("x"), token=token).json["id"]
            got = ask(f"{url}/api/fhir/{path}", data={**data, "status": "amended"}, token=token, method="PUT")
            process.kill()
        self.assertEqual(got.status, 200)
        for note in (None, None, "the file says more now"):
            loaded.write_text(json.dumps({**data, "note": note}))
            with s4s.Server(db=self.path, data=str(loaded)) as portal:
                for name, status in ((path, "amended"), (f"Observation/{new}", "final")):
                    self.assertEqual(ask(f"{portal.fhir_url}/{name}", token=token).json["status"], status)
                if note:
                    portal.reset()
                    token = portal.issue_token()["access_token"]
                    self.assertEqual(ask(f"{portal.fhir_url}/{path}", token=token).json["note"], note)
                    self.assertEqual(ask(f"{portal.fhir_url}/Observation/{new}", token=token).status, 404)

    def test_two_servers_may_share_a_file_and_each_sees_at_once_what_the_other_writes(self) -> None:
        with s4s.Server(db=self.path) as one, s4s.Server(db=self.path) as other:
            tokens = one.issue_token()
            for status in (200, 401):
                self.assertEqual(ask(f"{one.fhir_url}/Patient/{DANIEL}", token=tokens).status, status)
                ask(other.url + "/oauth/revoke", form={"token": tokens["refresh_token"]}, basic=TEST_SUITE)

    def test_a_full_disk_is_said_and_reading_goes_on(self) -> None:
        with s4s.Server(db=self.path) as portal:
            token = portal.issue_token()["access_token"]
            portal.portal.log = lambda *lines: None
            [[pages]] = portal.portal.state.rows("PRAGMA page_count")
            portal.portal.state.row(f"PRAGMA max_page_count = {pages}")
            metadata = {"redirect_uris": ["https://app.example/" + "x" * 900]}
            answers = [ask(portal.url + "/oauth/register", data=metadata) for _ in range(60)]
            self.assertEqual({answer.status for answer in answers}, {201, 503})
            self.assertIn("full", answers[-1].json["error_description"])
            self.assertEqual(ask(f"{portal.fhir_url}/Patient/{DANIEL}", token=token).status, 200)

    def test_a_file_of_another_version_or_program_is_refused_in_words_and_left_as_it_was(self) -> None:
        with s4s.Server(db=self.path) as portal:
            self.assertEqual(ask(f"{portal.open_fhir_url}/Patient").status, 200)
            row = portal.portal.state.row("SELECT * FROM kept_by")
            self.assertEqual(tuple(row or ()), (f"s4s_proxy.py {s4s.__version__}",))
        ours, other = Path(self.path).read_bytes(), Path(self.path + ".other")
        version = rf"kept by another version of s4s_proxy\.py than {s4s.__version__}: use that one, or name"
        program = "made by another program; expected a database of this program, or a new file"
        for content, sql, words in (
                (ours, "DROP VIEW kept_by; CREATE VIEW kept_by AS SELECT 9; DROP TABLE grants", version),
                (ours, "DROP VIEW kept_by", version),  # 0.1.0 made none
                (ours, "ALTER TABLE launches ADD COLUMN more", version),
                (ours, "ALTER TABLE resources ADD COLUMN more", version),
                (ours, "DROP INDEX tokens_by_grant; CREATE INDEX tokens_by_grant ON tokens (spent)", version),
                (b"", "CREATE TABLE users (username, name)", program), (b"", "CREATE TABLE x (y)", program)):
            other.write_bytes(content)
            with contextlib.closing(sqlite3.connect(other)) as database:
                database.executescript(sql)
            before = other.read_bytes()
            with self.subTest(sql), self.assertRaisesRegex(s4s.StartError, words):
                s4s.Server(db=str(other)).start()
            self.assertEqual(other.read_bytes(), before)
            other.unlink()

    def test_a_file_that_is_no_database_is_refused_in_words(self) -> None:
        Path(self.path).write_bytes(b"this is not a database, but long enough to look at" * 100)
        with self.assertRaisesRegex(s4s.StartError, "not a database"):
            s4s.Server(db=self.path).start()


class Concurrency(unittest.TestCase):
    """Many at once."""
    def test_64_threads_through_the_whole_flow_do_not_disturb_each_other(self) -> None:
        with tempfile.TemporaryDirectory() as folder, s4s.Server(db=f"{folder}/state.db") as portal:
            numbers = iter(range(64))

            def run() -> list[int]:
                app, patients = App(portal), (DANIEL, AMY) if next(numbers) % 2 else (AMY, DANIEL)
                again = app.refresh(app.tokens(patient_id=patients[0])["refresh_token"]).json
                return [ask(f"{portal.fhir_url}/Patient/{patient}", token=again["access_token"]).status
                        for patient in patients]
            self.assertEqual(at_once(64, run), [[200, 403]] * 64)
            self.assertEqual(len(portal.portal.state.rows("SELECT * FROM grants WHERE NOT ended")), 64)

    def test_reset_in_the_middle_of_traffic_is_safe(self) -> None:
        with s4s.Server() as portal:
            statuses: set[int] = set()
            ended = threading.Event()

            def read() -> None:
                while not ended.is_set():
                    token = portal.issue_token()["access_token"]
                    statuses.add(ask(f"{portal.fhir_url}/Patient/{DANIEL}", token=token).status)
            with together(4, read):
                for _ in range(50):
                    portal.reset()
                ended.set()
            self.assertLessEqual(statuses, {200, 401})


# ######################################################################## 5 request, response, route

class Nonsense(PortalTest):
    """Values that no client should send, but some do: 400 with words, never a 500, never a hang."""
    def setUp(self) -> None:
        super().setUp()
        lines = log_of(self.portal)
        self.addCleanup(lambda: self.assertEqual([line for line in lines if line.startswith("BUG")], []))

    def test_percent_signs_without_digits_bytes_that_are_no_utf_8_and_too_many_parameters(self) -> None:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        asked = ("oauth/authorize", "login", "launch", "api/open-fhir/Patient", "oauth/debug/introspect")
        posted = ("oauth/token", "oauth/introspect", "oauth/revoke", "api/open-fhir/Patient/_search")
        for text in ("%", "%2", "%zz", "%ff", "%c0%80", "%ed%a0%80", "a=%00", "%00=a", "a&" * 2000):
            for path in asked:
                self.assertEqual(self.at(f"/{path}?{text}").status, 400, (path, text[:9]))
            for path in posted:
                got = self.at(f"/{path}", body=text.encode(), headers=form)
                self.assertEqual(got.status, 400, (path, text[:9]))
        got = self.at("/oauth/token", body=b"client_id=\0", headers=form)
        self.assertIn("NUL", got.json["error_description"])

    def test_a_body_in_a_coding_is_told_that_none_is_taken(self) -> None:
        form: Any = {"form": {"_id": "x"}}
        for path, body in (("oauth/token", form), ("oauth/userinfo", form), ("oauth/register", {"data": {}}),
                           ("oauth/debug/clock", {"data": {}}), ("api/open-fhir/Patient/_search", form)):
            for coding, refused in (("gzip", True), ("br, gzip", True), ("identity", False)):
                with self.subTest(path, coding=coding):
                    got = self.at(f"/{path}", headers={"Content-Encoding": coding}, **body)
                    self.assertEqual([got.status == 415, "accept-encoding" in got.headers], [refused] * 2)

    def test_a_path_may_hold_anything(self) -> None:
        for path in ("/%00", "/..", "/%2e%2e/", "//evil.example/", "/api/fhir/%00", "/api/open-fhir/%ff",
                     "/;x", "/oauth/", "/revoke/", "/api/open-fhir/Patient/" + "x" * 60_000):
            self.assertIn(self.at(path).status, (401, 404, 405), path[:40])

    def test_what_json_has_not(self) -> None:
        for value in ("NaN", "[NaN]", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 1001, "9" * 900_000,
                      "1" * 400 + ".5", "01", "0x1", ".5", '"\\ud800"', '{"\\udfff": 1}', '["\\ud83d"]'):
            for path, body in (("/oauth/register", '{"redirect_uris": ["https://a.example/"], "x": %s}'),
                               ("/oauth/debug/clock", '{"seconds": %s}')):
                got = self.post(path, (body % value).encode())
                self.assertEqual((got.status, got.json["error"]), (400, "invalid_request"), (path, value[:9]))
        for text in (b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000, b'{"a":' * 50_000):
            self.is_error(self.post("/oauth/register", text), "invalid_request")

    def test_json_as_deep_as_is_taken_comes_out_again_everywhere(self) -> None:
        def nested(depth: int) -> Any:
            return json.loads("[" * depth + "]" * depth)
        metadata = {"redirect_uris": ["https://a.example/cb"], "launch_uris": ["https://a.example/"]}
        self.assertEqual(self.post("/oauth/register", {**metadata, "x": nested(s4s.MAX_DEPTH)}).status, 400)
        got = self.post("/oauth/register", {**metadata, "x": nested(s4s.MAX_DEPTH - 1)})
        self.assertEqual((got.status, self.at("/launch").status), (201, 200))
        app = App(self.portal, known=(got.json["client_id"], got.json["client_secret"]))
        self.assertEqual((app.refresh("x").status, self.at("/oauth/debug/requests").status), (400, 200))

    def test_every_member_of_every_control_may_be_of_a_wrong_type(self) -> None:
        wrong: tuple[Any, ...] = (None, True, 7, -1, 1.5, 10 ** 400, "", "x", "\0", [], {}, [None], [{}],
            {"a": 1}, "x" * 9999, "http://[")
        good: dict[str, dict[str, Any]] = {
            "issue_token": {"client_id": "test-suite", "username": "daniel-adams"}, "advance": {"seconds": 0},
            "approve": {"url": App(self.portal).authorize_url(), "username": "daniel-adams"},
            "launch": {"launch_uri": "https://a.example/"}, "fail": {"endpoint": "jwks", "status": 503}}
        paths = {route.endpoint.__name__: route.path for route in s4s.ROUTES}
        for control, function in s4s.CONTROLS.items():
            for name in list(inspect.signature(function).parameters)[1:]:
                for value in wrong:
                    with self.subTest(control=control, name=name, value=str(value)[:20]):
                        got = self.post(paths["debug_" + control], {**good.get(control, {}), name: value})
                        self.assertIn(got.status, (200, 400, 403))
                        if got.status != 200:
                            self.assertEqual(sorted(got.json), ["error", "error_description"])

    def test_every_member_of_client_metadata_may_be_of_a_wrong_type(self) -> None:
        wrong: tuple[Any, ...] = (
            None, True, 7, [], {}, [7], [[]], {"keys": 1}, {"keys": [1]}, {"keys": [{"crv": "P-384"}]},
            {"keys": [{"kty": "RSA", "n": 1, "e": []}]}, {"keys": [{"kty": {}}]}, "\0", "http://[")
        for name in [*sorted(s4s.METADATA_STRINGS | s4s.METADATA_URLS | s4s.METADATA_LISTS), "jwks"]:
            for value in wrong:
                with self.subTest(name=name, value=value):
                    got = self.post("/oauth/register", {"redirect_uris": ["https://a.example/"], name: value})
                    self.assertIn(got.status, (201, 400))
                    if got.status == 400:
                        self.assertIn(name, got.json["error_description"])

    def test_a_repeated_parameter_is_refused_by_name(self) -> None:
        for path, name in (("token", "grant_type"), ("token", "scope"), ("token", "of_no_meaning"),
                           ("introspect", "token"), ("revoke", "token")):
            form = [*{"grant_type": "refresh_token", name: "x"}.items(), (name, "x")]
            got = self.at(f"/oauth/{path}", form=form, basic=TEST_SUITE)
            self.is_error(got, "invalid_request", words=name)

    def test_a_scope_is_judged_in_a_moment_however_long(self) -> None:
        started = time.process_time()  # what others take from the machine doesn't count
        for scope in ("a" * 1_000_000 + '"', " " * 1_000_000, "patient/Aa.r " * 80_000):
            got = self.post("/oauth/register", {"redirect_uris": ["https://a.example/"], "scope": scope})
            self.is_error(got, "invalid_client_metadata")
        words = [f"patient/Observation.r?code={number}" for number in range(250)]
        tokens, app = self.portal.issue_token(scope=" ".join(words)), App(self.portal, known=TEST_SUITE)
        self.is_error(app.refresh(tokens["refresh_token"], scope=(words[-1] + " ") * 25_000), "invalid_scope")
        self.assertLess(time.process_time() - started, 5)

    def test_cookies_of_others_neither_hide_ours_nor_cost_time(self) -> None:
        [(name, value)] = signed_in(self.portal).cookies.items()
        started = time.process_time()  # what others take from the machine doesn't count
        for other in ('theirs={"a": [1, "x"]}', "=", ";;", "a b", 'c="d', 'x="' + "\\\\" * 29000 + '"', "é"):
            for cookie in (f"{other}; {name}={value}", f"{name}={value}; {other}"):
                got = self.at("/apps", headers={"Cookie": cookie.encode("utf-8").decode("latin-1")})
                self.assertEqual(got.status, 200, cookie[:50])
        self.assertLess(time.process_time() - started, 5)

    def test_a_header_that_would_break_the_line_is_kept_in_it(self) -> None:
        answer = s4s.Response(200, headers=[("X-Text", "a\r\nX-Evil: 1\0é\u20ac")])
        self.serve_instead("/health", lambda portal, request: answer)
        headers = self.at("/health").headers
        self.assertEqual((headers["x-text"], "x-evil" in headers), ("a??X-Evil: 1?é?", False))


def from_elsewhere(url: str) -> list[dict[str, str]]:
    """What browsers send with a request to a portal at `url` from another site's page."""
    own = {"Origin": url}
    return [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": url + ".evil.example"},
            {"Origin": url.replace("http:", "https:")}, {"Origin": "http://127.0.0.1:1"},
            {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
            {**own, "Sec-Fetch-Site": "same-site"}]


def from_here(url: str) -> list[dict[str, str]]:
    """What a page of the portal itself sends, a person who typed the address, and what is no browser."""
    return [{"Origin": url}, {"Sec-Fetch-Site": "none"}, {"Origin": url, "Sec-Fetch-Site": "same-origin"}, {}]


class OtherSites(PortalTest):
    """What other web pages, and who writes links and names, must not be able to do (RFC 6819, OWASP)."""
    def test_no_form_works_without_the_token_of_its_own_page(self) -> None:
        browser, other, app = signed_in(self.portal), Browser(self.portal), App(self.portal)
        other.sign_in("joseph-ross")
        app.tokens()
        [[grant_id]] = self.portal.portal.state.rows("SELECT grant_id FROM grants")
        foreign = Form(other.open(self.portal.url + "/apps").text).fields[0][1]
        request_id = ask(app.authorize_url()).location["request"]
        consent = {"request": request_id, "decision": "approve", "patient_id": DANIEL,
                   "security_labels": "patient", "approval_expires": "2099-01-01"}
        for path, fields in (("/login", {"username": "joseph-ross", "password": "demo-password"}),
                ("/logout", {}), ("/revoke/" + grant_id, {}),
                ("/launch", {"launch_uri": "https://a.example/"}), ("/oauth/consent", consent)):
            for token in ("", "x" * 64, foreign, s4s.form_token("")):
                headers = {} if path == "/login" else browser.headers  # with none, any site knows the last
                got = self.at(path, form={**fields, "form_token": token}, headers=headers)
                self.assertEqual((got.status, got.cookies), (403, []), (path, token))
        apps = browser.open(self.portal.url + "/apps").text
        self.assertRegex(apps, "(?s)Signed in as Daniel.*Stop sharing")

    def test_a_session_planted_before_is_worth_nothing_after_signing_in(self) -> None:
        name, planted = f"s4s_session_127.0.0.1_{self.portal.port}", "planted-" * 4
        browser = Browser(self.portal)
        browser.cookies[name] = planted  # of the shape of ours, so the sign-in page takes it
        browser.open(self.portal.url + "/login")
        self.assertEqual(browser.cookies[name], planted)
        self.assertIn("Sign out", browser.sign_in().text)
        self.assertNotEqual(browser.cookies[name], planted)
        self.assertEqual(self.at("/apps", headers={"Cookie": f"{name}={planted}"}).status, 303)

    def test_signing_in_leads_nowhere_else(self) -> None:
        for target in ("https://evil.example/", "//evil.example", "///evil.example", "/\\evil.example",
                       "\\\\evil.example", "/..//evil.example", "/a:b@evil.example", "/apps#@evil", "@evil",
                       "?x", ".evil.example", "/.evil", "/%0d%0aX: y", "%2f%2fevil", "/\tevil", "/ e",
                       "/apps\r\nX-Evil: 1", "javascript:alert(1)", "http:evil.example"):
            page = self.at("/login?" + urlencode({"next": target})).text
            self.assertEqual(dict(Form(page).fields)["next"], "/apps", target)
        for target, door in (("//evil.example", "/login"), ("/apps\r\nX-Evil: 1", "/login"),
                             ("//evil.example", "/logout")):
            browser = Browser(self.portal)
            browser.open(self.portal.url + "/login")
            form = {**dict(Form(browser.page.text).fields), "next": target, "password": "demo-password"}
            got = self.at(door, form=form, headers=browser.headers)
            self.assertEqual((got.status, got.headers["location"]), (303, self.portal.url + "/apps"))
            self.assertNotIn("x-evil", got.headers)

    def test_no_value_breaks_out_of_www_authenticate(self) -> None:
        token = self.portal.issue_token(scope="patient/Patient.rs")
        for path in ('Observation", x="y', "Observation%22%0d%0aX-Evil:%201", "Observation", "%22",
                     "Patient/%0d%0aX-Evil:1"):
            got = self.fhir(quote(path, "%/"), token)
            self.assertNotIn("x-evil", got.headers)
            self.assertRegex(got.headers.get("www-authenticate", 'Bearer realm="s4s"'),
                             r'^Bearer realm="s4s"(, [a-z_]+="[A-Za-z0-9 /.*_]+")*$')

    def test_debug_endpoints_obey_no_other_site(self) -> None:
        url = self.portal.url
        for headers in from_elsewhere(url):
            for method, path, data in (
                    ("POST", "reset", {}), ("POST", "clock", {"seconds": 1}), ("DELETE", "requests", None),
                    ("POST", "token", {"client_id": "test-suite", "username": "clinician"}),
                    ("GET", "requests", None), ("GET", "introspect?token=x", None)):
                got = ask(f"{url}/oauth/debug/{path}", method=method, data=data, headers=headers)
                self.assertEqual(got.status, 403, (headers, path))
                self.assertNotIn("access-control-allow-origin", got.headers)
        for headers in from_here(url):
            self.assertEqual(self.post("/oauth/debug/clock", {"seconds": 0}, headers=headers).status, 200)

    def test_debug_endpoints_take_no_body_that_a_plain_form_could_send(self) -> None:
        for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            got = self.at("/oauth/debug/token", headers={"Content-Type": media_type},
                      body=b'{"client_id": "test-suite", "username": "clinician"}')
            self.assertEqual(got.status, 415, media_type)

    def test_a_preflight_allows_whatever_headers_asked_for_but_opens_no_page(self) -> None:
        for path in ("/oauth/token", "/api/fhir/Patient", "/oauth/introspect"):
            for asked, allowed in (("authorization, Cache-Control",) * 2, ("x:\xe9", "x"),
                                   ("", "Authorization, Content-Type")):  # asked by hand, to see whether
                with self.subTest(path, asked=asked):
                    headers = {"Origin": "https://app.example", "Access-Control-Request-Headers": asked}
                    got = self.at(path, method="OPTIONS", headers=headers)
                    told = [got.headers[f"access-control-allow-{name}"] for name in ("origin", "headers")]
                    self.assertEqual((got.status, told), (204, ["*", allowed]))
        for path in ("/oauth/authorize", "/login", "/apps", "/oauth/consent", "/launch", "/oauth/debug/token",
                     "/oauth/debug/reset"):
            got = self.at(path, method="OPTIONS", headers={"Origin": "https://evil.example"})
            self.assertNotIn("access-control-allow", str(got.headers), path)


class Exposed(Test):
    """A server that others can reach: whom it takes for itself, and whom it asks."""
    def answer(self, name: str, host: str = "0.0.0.0", **settings: Any) -> tuple[int, bool]:
        """The status where this name is asked, and whether the answer knows a way."""
        portal = self.during(contextlib.closing(s4s.Portal(s4s.Settings(host=host, **settings))))
        response = s4s.dispatch(portal, s4s.Request("GET", "/health", {"host": name}))
        return response.status, b"--base-url" in response.body

    def test_a_name_that_is_not_its_own_is_served_only_by_base_urls_and_while_nobody_is_trusted(self) -> None:
        public: Any = {"base_url": "http://portal.example"}
        self.assertEqual(self.answer("rebound.example:8000", **public), (200, False))
        for settings in ({}, {"debug": True}, {"debug": True, **public}, {"open_fhir": True, **public}):
            portal_example = 200 if "base_url" in settings else 421
            for host, status in (("rebound.example:8000", 421), ("portal.example", portal_example),
                                 ("10.1.2.3:8000", 200), ("[fd00::1]:8000", 200), ("localhost:8000", 200),
                                 ("0.0.0.0", 200), ("10.1.2.3.example", 421), ("[x", 421), ("", 421)):
                self.assertEqual(self.answer(host, **settings), (status, status == 421), (settings, host))
        for host, status in (("Portal.lan:8000", 200), ("portal.lan", 200), ("portal.lan.x", 421)):
            self.assertEqual(self.answer(host, "portal.LAN"), (status, status == 421), host)
        shut = {**public, "debug": False, "open_fhir": False}
        for host in ("rebound.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1",
                     "0.0.0.0", "[::2]", "localhost.", "127.0.0.1.", "2130706433", "localhost:80.evil"):
            for settings in ({}, shut):  # on loopback, whatever is open
                self.assertEqual(self.answer(host, "127.0.0.1", **settings), (421, True), (settings, host))

    def test_a_false_servers_name_is_neither_aud_nor_issuer_whatever_the_host_header(self) -> None:
        """A false server sends an app on to the true one, under its own name: tokens for it would be ours."""
        with s4s.Server(host="0.0.0.0", fixtures=with_service(jwks={"keys": [RSA_JWK]})) as portal:
            app, keyed, own = App(portal), KeyedApp(portal, "service"), f"127.0.0.1:{portal.port}"
            for host, statuses in (("victim.example", [421] * 3), (own, [200, 303, 200])):
                assertion = keyed.assertion(aud=f"http://{host}/oauth/token")
                answers = [keyed.token(assertion, headers={"Host": host})] + [
                    ask(url, headers={"Host": host}) for url in (
                        app.authorize_url(aud=f"http://{host}/api/fhir"),
                        portal.address + "/.well-known/openid-configuration")]
                self.assertEqual([answer.status for answer in answers], statuses, host)

    def test_who_asks_under_another_name_is_answered_under_that_alone(self) -> None:
        for host, evil in (("127.0.0.1", "localhost:9999"), ("0.0.0.0", "203.0.113.5")):
            with s4s.Server(host=host, debug=True) as portal:
                demo = App(portal, known=("demo-app", ""), redirect_uris=[f"http://{evil}/demo"])
                true, other = f"127.0.0.1:{portal.port}", f"localhost:{portal.port}"
                browser = signed_in(portal)
                [session_id] = browser.cookies.values()
                browser.cookies = {f"s4s_session_{re.sub('[^a-z0-9.]', '_', name)}": session_id
                                   for name in (true, other, evil)}  # as if it had signed in at each
                for app, asked_at in ((demo, evil), (App(portal), evil), (App(portal), other)):
                    url = app.authorize_url(aud=f"http://{asked_at}/api/fhir")
                    given = {**ask(url, headers={"Host": asked_at}).location, "patient_id": DANIEL}
                    chosen = {**given, "decision": "approve", "form_token": s4s.form_token(session_id),
                              "security_labels": "patient", "approval_expires": s4s.day_of(time.time(), 1)}
                    for name, statuses, has_code in ((true, [400, 400], False), (asked_at, [200, 303], True)):
                        with self.subTest(asked_at=asked_at, answered_at=name):
                            consent = f"{portal.url}/oauth/consent?{urlencode(given)}"
                            answers = [browser.ask(consent, headers={"Host": name}, form=form)
                                       for form in (None, chosen)]
                            self.assertEqual([answer.status for answer in answers], statuses)
                            self.assertEqual("code=" in answers[1].headers.get("location", ""), has_code)
                    played = {"url": url.replace(true, asked_at), "username": "daniel-adams"}
                    back = ask(f"{portal.url}/oauth/debug/authorize", headers={"Host": asked_at}, data=played)
                    self.assertIn("code=", back.json["redirect_to"])

    def fetch(self, url: str) -> None:
        with self.assertRaises((OSError, ValueError, s4s.BadRequest)):
            s4s.fetch(url, True, s4s.OpenSockets(), seconds=0.5)

    def test_no_neighbour_is_asked_for_a_stranger(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as neighbour:
            neighbour.settimeout(0.05)
            place = f"127.0.0.1:{neighbour.getsockname()[1]}"
            for url in (f"http://{place}/", f"https://{place}/", "http://127.0.0.1:1/", "http://[::1]:1/",
                        "http://localhost:1/", "http://10.0.0.1/", "http://[::ffff:127.0.0.1]/",
                        "http://169.254.169.254/", "http://nowhere.invalid/", f"http://{'x' * 64}/"):
                self.fetch(url)
            with self.assertRaises(TimeoutError if sys.version_info >= (3, 10) else socket.timeout):
                neighbour.accept()  # nobody came
        with mock.patch("socket.create_connection", side_effect=OSError) as to:  # some have a way there
            for near in ("[64:ff9b::a00:1]", "[64:ff9b:1::a00:1]", "[2002:7f00:1::]", "[::127.0.0.1]",
                         "[fec0::1]", "[ff0e::1]", "224.0.0.1"):
                self.fetch(f"http://{near}/")
        self.assertEqual(to.call_args_list, [])

    def test_the_address_that_was_judged_is_the_one_connected_to(self) -> None:
        answers = [[(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80))] for ip in ("8.8.8.8", "127.0.0.1")]
        with mock.patch("socket.getaddrinfo", side_effect=answers) as asked, \
                mock.patch("socket.create_connection", side_effect=OSError) as to:
            self.fetch("http://rebound.example/")
        self.assertEqual((asked.call_count, asked.call_args[0][0]), (1, "rebound.example"))
        self.assertEqual(to.call_args[0][0], ("8.8.8.8", 80))


class Bugs(PortalTest):
    """A bug of ours is a 500 in words, and its log shows no value."""
    def test_the_log_names_the_place_and_no_secret_and_outside_of_requests_one_connection_ends(self) -> None:
        lines, bug = log_of(self.portal), RuntimeError("the secret is demo-secret-s4s")
        self.serve_instead("/oauth/token", mock.Mock(side_effect=bug))
        self.is_error(self.at("/oauth/token", form={"a": "b"}), "server_error", 500)
        with mock.patch.object(s4s.Handler, "read_request", side_effect=bug), \
                self.assertRaises((OSError, http.client.HTTPException)):
            self.at("/health")
        self.assertEqual(self.at("/health").status, 200)
        self.assertEqual([("RuntimeError" in line, "secret" in line) for line in lines], [(True, False)] * 2)


# ######################################################################## 6 clients with a secret, or none

class Registration(PortalTest):
    """POST /oauth/register (RFC 7591): metadata is checked and given back, id and secret are drawn here."""
    def register(self, **members: Any) -> Answer:
        return self.post("/oauth/register", {"redirect_uris": ["https://app.example/cb"], **members})

    def kept(self, registered: Answer) -> Any:
        return cast(Any, self.portal.portal.client(registered.json["client_id"])).metadata

    def assert_refused(self, error: str, member: str, value: Any, **others: Any) -> None:
        with self.subTest(member=member, value=value):
            self.is_error(self.register(**{member: value}, **others), error, words=member.partition("#")[0])

    def test_an_app_is_told_its_id_secret_and_defaults_and_nothing_that_is_not_registered(self) -> None:
        sent = {"registration_client_uri": "https://x.example/", "registration_access_token": "x",
                "request_uris": ["https://x/"], "id_token_encrypted_response_alg": "RSA-OAEP",
                "default_max_age": 5, "of_our_own": 1, "client_id": "mine", "client_secret": "mine"}
        answer = self.register(**sent)
        self.assertEqual((answer.status, answer.headers["cache-control"]), (201, "no-store"))
        got, kept = answer.json, self.kept(answer)
        for name in ("client_id", "client_secret"):
            self.assertRegex(got[name], r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
        self.assertEqual({name for name in sent if name in kept or got.get(name) == sent[name]}, set())
        self.assertEqual([got[name] for name in (
            "client_secret_expires_at", "client_name", "grant_types", "response_types",
            "token_endpoint_auth_method", "scope")], [
                0, got["client_id"], ["authorization_code", "refresh_token"], ["code"], "client_secret_basic",
                "openid fhirUser launch launch/patient patient/*.rs offline_access"])

    def test_what_was_sent_is_given_back(self) -> None:
        sent = {"client_name": "App", "client_name#fr": "Appli", "client_uri": "https://app.example/#about",
                "contacts": ["a@app.example"], "software_id": "x", "software_version": "1", "scope": "openid",
                "jwks": {"keys": [RSA_JWK]}, "token_endpoint_auth_method": "private_key_jwt",
                "token_endpoint_auth_signing_alg": "RS384", "application_type": "web",
                "launch_uris": ["https://app.example/launch"], "redirect_uris": ["https://a.example/cb"],
                "response_types": ["code"], "grant_types": ["authorization_code", "client_credentials"]}
        got = self.register(**sent)
        self.assertEqual((got.status, {name: got.json[name] for name in sent}), (201, sent))
        self.assertNotIn("client_secret", got.json)

    def test_addresses_that_run_or_break_lines_or_lead_astray_can_not_be_registered(self) -> None:
        for uri in ("javascript:alert(1)", "JaVaScRiPt:alert(1)", "data:text/html,x", "vbscript:x",
                    "blob:https://a/", "https://a\r\nX: y", "https://a\\b/", "https://a b/", "\thttps://a/",
                    "https://a\0/", "https://me:pw@a/", "//a/", "https:a", "http://[", "/relative",
                    "https://", "http://user@host/", "file:///etc/passwd", "https://a.example:0/"):
            self.assert_refused("invalid_redirect_uri", "redirect_uris", [uri])
            self.assert_refused("invalid_client_metadata", "launch_uris", [uri])
        self.assert_refused("invalid_redirect_uri", "redirect_uris", ["https://a.example/#fragment"])

    # Schemes that browsers, Windows, macOS, Linux, iOS or Android act on by themselves.
    ACTED_UPON = ("javascript:alert(1)", "data:text/html,x", "sms:1", "ms-msdt:/id", "search-ms:query",
        "MS-Settings:x", "intent:x", "chrome-extension://x/", "microsoft-edge:https://x",
        "microsoft.windows.camera:x", "jnlp://x", "jnlps:x", "vnc://x", "RDP://x", "search:q", "content://x",
        "web+x://y", "xmpp:a", "sip:a", "bitcoin:a", "x-apple.systempreferences:x", "prefs:x",
        "shortcuts://run", "apt:x", "git+ssh://x", "firefox:x", "googlechrome://x", "smsto:1", "matrix:u",
        "z39.50r://x", "devtools://x", "cifs://x")

    def test_who_registers_itself_has_a_scheme_with_a_period_or_a_known_apps(self) -> None:
        for uri in ("com.example.app:/cb", "org.app://callback", "exp://127.0.0.1:80/--/cb", "vscode://x/cb",
                    "ionic://localhost", "cursor://anysphere.cursor-mcp/oauth/callback", "windsurf://x/cb",
                    "vscode-insiders://x/cb", "capacitor://localhost", "smartapp://callback", "CURSOR://x"):
            self.assertEqual(self.register(redirect_uris=[uri]).status, 201, uri)
        for uri in (*self.ACTED_UPON, "myapp:/cb", "smart-app://cb", "cursorx://cb", "xvscode://cb"):
            self.assert_refused("invalid_redirect_uri", "redirect_uris", [uri])
        got = self.register(redirect_uris=["myapp:/cb"]).json["error_description"]
        for words in ("a period", "cursor", "--client", "myapp:/cb"):
            self.assertIn(words, got)

    def test_the_operator_may_give_any_scheme_that_nothing_else_acts_on(self) -> None:
        for uri in ("myapp:/cb", "smart-app://cb", "com.example.app:/cb", "vscode://x/cb"):
            fixtures = {"clients": [{"client_id": "listed", "redirect_uris": [uri]}]}
            with s4s.Server(client="given=" + uri, fixtures=fixtures) as portal:
                for client_id in ("given", "listed"):
                    app = App(portal, known=(client_id, ""), redirect_uris=[uri])
                    back = portal.approve(app.authorize_url(), username="daniel-adams")
                    self.assertTrue(back.startswith(uri + "?code="), back)
        for uri in self.ACTED_UPON:
            fixtures = {"clients": [{"client_id": "listed", "redirect_uris": [uri]}]}
            for settings in ({"client": ["given=" + uri]}, {"fixtures": fixtures}):
                with self.subTest(settings=settings), self.assertRaisesRegex(s4s.StartError, "redirect_uris"):
                    s4s.Seeds(s4s.Settings(**settings))

    def test_a_member_that_can_not_be_is_named(self) -> None:
        self.assert_refused("invalid_redirect_uri", "redirect_uris", [])
        for member, value in (
                ("client_name", 5), ("client_uri", "ftp://a/"), ("logo_uri", []), ("contacts", "a"),
                ("contacts", [1]), ("redirect_uris", "https://app.example/cb"), ("redirect_uris", [7]),
                ("redirect_uris", [None]), ("redirect_uris", [""]), ("grant_types", "authorization_code"),
                ("grant_types", ["implicit"]), ("grant_types", [""]), ("response_types", ["token"]),
                ("token_endpoint_auth_method", 1), ("token_endpoint_auth_method", "client_secret_jwt"),
                ("software_id", {}), ("launch_uris", ["/x"]), ("launch_uris", ["app:/x"]), ("scope", ["a"]),
                ("id_token_signed_response_alg", "none"), ("scope", 'a"b'), ("scope", " "), ("jwks", 1),
                ("jwks", {}), ("jwks", {"keys": [1]}), ("jwks", {"keys": [{**RSA_JWK, "d": "x"}]}),
                ("jwks", {"keys": [RSA_JWK] * 2}), ("jwks", {"keys": [{**RSA_JWK, "n": "AQAB"}]}),
                ("jwks_uri", "x"), ("security_labels", ["nonsense"]), ("client_uri#fr", 1),
                ("subject_type", "pairwise"), ("tos_uri", None), ("response_types", []), ("contacts", [""]),
                ("logo_uri", "http://:80/x"),
                ("jwks", {"keys": [{"kty": "EC", "crv": "P-384"}]}), ("jwks", {"keys": [{"kty": "RSA"}]})):
            error = "invalid_redirect_uri" if member == "redirect_uris" else "invalid_client_metadata"
            self.assert_refused(error, member, value)

    def test_who_registers_itself_says_64_kib_at_most_as_kept(self) -> None:
        over, uri = 64 << 10, "https://app.example/"
        for member, value in (("client_name", "&" * over), ("client_name", "\u20ac" * (over // 6)),
                              ("client_name#fr", "x" * over), ("redirect_uris", [uri] * (over // len(uri))),
                              ("jwks", {"keys": [{"kid": str(number)} for number in range(over // 10)]})):
            got = self.register(**{member: value})
            self.is_error(got, "invalid_client_metadata", words="itself: expected 64 KiB at most")
        name = "x" * (over - len(json.dumps(self.kept(self.register(client_name="x")))) + 1)
        got = self.register(client_name=name)
        self.assertEqual((got.status, len(json.dumps(self.kept(got)))), (201, over))
        listed = {"client_id": "mine", "client_name": "x" * over, "redirect_uris": [uri]}
        self.assertTrue(s4s.Seeds(s4s.Settings(fixtures={"clients": [listed]})).clients["mine"])

    def test_a_key_without_a_type_or_of_another_kind_is_let_be(self) -> None:
        for key in ({"crv": "P-384", "kid": "x"}, {"kty": ["RSA"]}, {"kty": "EC", "crv": "P-256"},
                    {"kty": "OKP", "crv": "Ed25519", "x": "AA"}):
            self.assertEqual(self.register(jwks={"keys": [key]}).status, 201, key)

    def test_the_code_comes_with_its_grant_type_alone_and_keys_come_in_one_way(self) -> None:
        got = self.post("/oauth/register", {"grant_types": ["client_credentials"]})
        self.assertEqual((got.status, got.json["redirect_uris"], got.json["response_types"]), (201, [], []))
        for member, value, others in (("response_types", ["code"], {"grant_types": ["client_credentials"]}),
                ("response_types", [], {"grant_types": ["authorization_code"]}),
                ("jwks_uri", "https://app.example/jwks", {"jwks": {"keys": [RSA_JWK]}})):
            self.assert_refused("invalid_client_metadata", member, value, **others)
        got = self.register(token_endpoint_auth_method="private_key_jwt")
        self.is_error(got, "invalid_client_metadata", words="private_key_jwt needs jwks or jwks_uri")


class ClientAuthentication(PortalTest):
    """How an app proves who it is at the token endpoint (RFC 6749 section 2.3), and where it listens."""
    def test_an_app_proves_itself_by_one_secret_in_one_way(self) -> None:
        app, other = App(self.portal), App(self.portal)
        mine, secret = app.client_id, app.secret
        public = App(self.portal, token_endpoint_auth_method="none").client_id
        keyed, encoded = KeyedApp(self.portal).client_id, base64.b64encode(mine.encode()).decode()
        cases: Any = (("another's", {}, (mine, other.secret), 401, "expected the id and the secret"),
            ("no secret", {"client_id": mine}, None, 401, "expected the id and the secret"),
            ("an empty secret", {}, (mine, ""), 401, "expected the id and the secret"),
            ("a public one's", {"client_id": public, "client_secret": "x"}, None, 401, "has no secret"),
            ("no keys", {"client_id": keyed}, None, 401, "registered for private_key_jwt"),
            ("a secret for keys", {}, (keyed, "x"), 401, "registered for private_key_jwt"),
            ("nobody", {"client_id": "nobody", "client_secret": "x"}, None, 401, "expected the id"),
            ("nothing", {}, None, 401, "no client authentication"),
            ("two clients", {"client_id": other.client_id}, (mine, secret), 400, "client_id differs"),
            ("twice", {"client_id": mine, "client_secret": secret}, (mine, secret), 400, "given twice"),
            ("no colon", {}, encoded, 401, "not base64 of client_id:client_secret"),
            ("no base64", {}, "?" + encoded, 401, "not base64 of client_id:client_secret"),
            ("right", {}, (mine, secret), 400, "refresh_token"),
            ("right", {"client_id": mine, "client_secret": secret}, None, 400, "refresh_token"))
        for why, form, basic, status, words in cases:
            with self.subTest(why):
                headers = {"Authorization": "Basic " + basic} if isinstance(basic, str) else {}
                got = self.at("/oauth/token", basic=None if headers else basic, headers=headers,
                          form={"grant_type": "refresh_token", "refresh_token": "x", **form})
                told = got.headers.get("www-authenticate", "")
                self.assertEqual((got.status, told[:5]), (status, "Basic" if status == 401 else ""))
                self.assertIn(words, got.json["error_description"])

    def test_whether_a_client_is_registered_is_told_to_nobody_who_is_not_this_client(self) -> None:
        public = App(self.portal, token_endpoint_auth_method="none")
        keyed = KeyedApp(self.portal, grant_types=["refresh_token"])
        unproven = [App(self.portal).client_id, public.client_id, "nobody"]
        for path in ("token", "introspect", "revoke"):
            by_secret, by_key = set(), set()
            for name in (*unproven, keyed.client_id):
                form = {"grant_type": "refresh_token", "refresh_token": "x", "token": "x", "client_id": name}
                signed = {"client_assertion_type": s4s.ASSERTION_TYPE,
                          "client_assertion": keyed.assertion(iss=name, sub=name)}
                got = self.at(f"/oauth/{path}", form={**form, "client_secret": "guess"})
                by_secret.add((got.status, got.body.replace(name.encode(), b"ID")))
                if name in unproven:
                    got = self.at(f"/oauth/{path}", form={**form, **signed})
                    by_key.add((got.status, got.body))
            seen = [(len(told), told.pop()[0]) for told in (by_secret, by_key)]
            self.assertEqual(seen, [(1, 401)] * 2, path)

    def test_a_native_app_may_listen_on_any_port_of_loopback(self) -> None:
        for method, registered, asked, fine in (
                ("none", "http://127.0.0.1/cb", "http://127.0.0.1:51004/cb", True),
                ("none", "http://127.0.0.1:8000/cb", "http://127.0.0.1:51004/cb", True),
                ("none", "http://[::1]/cb", "http://[::1]:51004/cb", True),
                ("none", "http://127.0.0.1/cb", "http://127.0.0.1:51004/cb/", False),
                ("none", "http://127.0.0.1/cb", "http://127.0.0.1:99999/cb", False),
                ("none", "http://127.0.0.1/cb", "http://127.0.0.1:1@else.example/cb", False),
                ("none", "http://127.0.0.1/cb", "http://[::1]/cb", False),
                ("none", "http://localhost/cb", "http://localhost:51004/cb", False),
                ("none", "http://else.example/cb", "http://else.example:51004/cb", False),
                ("client_secret_basic", "http://127.0.0.1/cb", "http://127.0.0.1:51004/cb", False)):
            with self.subTest(method=method, asked=asked):
                app = App(self.portal, redirect_uris=[registered], token_endpoint_auth_method=method)
                app.redirect_uri = asked
                self.assertEqual(ask(app.authorize_url()).status, 303 if fine else 400)
                if fine:
                    self.assertEqual(app.tokens()["patient"], DANIEL)


# ######################################################################## 7 sign-in

class Cookies(PortalTest):
    """The session cookie, and the forms that hang on it."""
    def test_a_planted_cookie_comes_back_in_no_header(self) -> None:
        name = f"s4s_session_127.0.0.1_{self.portal.port}"
        for value in ('"a\\015\\012X-Evil: 1"', "a%0d%0ab", "short", "x" * 31 + "=", "x" * 33, "'" * 32):
            got = self.at("/login", headers={"Cookie": f"{name}={value}"})
            [cookie] = got.cookies
            self.assertEqual((got.status, "x-evil" in got.headers, value in cookie), (200, False, False))
            self.assertRegex(cookie, rf"^{name}=[A-Za-z0-9_-]{{32}}; Path=/; HttpOnly; SameSite=Lax$", value)

    def test_its_name_is_of_the_address_that_browsers_see(self) -> None:
        containers = ("http://localhost:8001", "localhost_8001"), ("http://localhost:8002", "localhost_8002")
        for url, place in (*containers, ("http://h.example/north", "h.example_north"), ("", "localhost_8001"),
                           ("http://h.example/a/south", "h.example_a_south"), ("http://[::1]:1", "___1__1")):
            with s4s.Server(base_url=url or []) as portal:
                [cookie] = ask(portal.address + "/login", headers={"Host": "localhost:8001"}).cookies
                self.assertEqual(cookie.partition("=")[0], f"s4s_session_{place}", url)

    def test_a_session_that_a_neighbour_planted_beside_ours_counts_for_nobody(self) -> None:
        [(name, ours)], theirs = signed_in(self.portal).cookies.items(), Browser(self.portal)
        theirs.sign_in("joseph-ross")
        planted = theirs.cookies[name]
        for cookies, sees in (([planted, ours], False), ([ours, planted], False), ([ours, ours], True),
                              ([ours, "no/session"], True)):
            with self.subTest(cookies=cookies):
                got = self.at("/apps", headers={"Cookie": "; ".join(f"{name}={value}" for value in cookies)})
                self.assertEqual(("Sign out" in got.text, "Joseph" in got.text), (sees, False))

    def test_over_https_no_cookie_planted_over_http_or_by_another_host_is_a_session(self) -> None:
        with s4s.Server(base_url="https://portal.example") as portal:
            host = {"Host": "portal.example"}
            [cookie] = ask(portal.address + "/login", headers=host).cookies
            pattern = r"^__Host-s4s_session_portal.example=[\w-]{32}; Path=/; HttpOnly; SameSite=Lax; Secure$"
            self.assertRegex(cookie, pattern)
            session = s4s.start_session(portal.portal, s4s.Request("GET", "/", {}), "daniel-adams")
            for prefix, sees in (("__Host-", True), ("", False), ("__host-", False), ("__Secure-", False)):
                name = f"{prefix}s4s_session_portal.example"
                got = ask(portal.address + "/apps", headers={**host, "Cookie": f"{name}={session}"})
                self.assertEqual("Sign out" in got.text, sees, name)

    def test_the_name_filled_in_is_one_that_can_sign_in(self) -> None:
        for settings, username in (({}, "daniel-adams"), ({"data": "none"}, "clinician")):
            with s4s.Server(**settings) as portal:
                browser = Browser(portal)
                browser.open(portal.url + "/login")
                self.assertIn(("username", username), Form(browser.page.text).fields)
                self.assertIn("Sign out", browser.submit("sign-in").text)

    def test_a_form_that_stood_on_another_site_is_refused(self) -> None:
        url = self.portal.url + "/login"
        for sites, status in ((("", "same-origin", "none"), 303), (("cross-site", "same-site"), 403)):
            for site in sites:
                browser = Browser(self.portal)
                form = {**dict(Form(browser.open(url).text).fields), "password": "demo-password"}
                headers = {**browser.headers, **({"Sec-Fetch-Site": site} if site else {})}
                self.assertEqual(ask(url, form=form, headers=headers).status, status, site)

    def test_a_session_ends_by_itself_by_signing_out_and_by_signing_in_again(self) -> None:
        def wait(browser: Browser) -> None:
            browser.portal.advance(s4s.SESSION_SECONDS + 1)
        for end in (Browser.sign_out, Browser.sign_in, wait):
            browser = signed_in(self.portal)
            cookie = browser.headers
            self.assertEqual(self.at("/apps", headers=cookie).status, 200)
            end(browser)
            self.assertEqual(self.at("/apps", headers=cookie).status, 303, end)

    def test_a_stranger_can_not_learn_who_has_an_account(self) -> None:
        for username, password in (("nobody", "demo-password"), ("daniel-adams", "wrong"), ("nobody", "")):
            with mock.patch.object(s4s, "hash_password", wraps=s4s.hash_password) as hashed:
                page = Browser(self.portal).sign_in(username, password)
            self.assertEqual((page.status, hashed.call_count), (401, 1), username)
            self.assertIn("User name and password do not match.", page.text)


# ######################################################################## 8 the authorization request

def query_of(url: str) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(url).query))


def signed_in(portal: s4s.Server, path: str = "/login", username: str = "daniel-adams") -> Browser:
    browser = Browser(portal)
    browser.open(path if path.startswith("http") else portal.url + path)
    browser.sign_in(username)
    return browser


class AuthorizationRequest(PortalTest):
    """GET and POST /oauth/authorize: each check, and where its error goes, before anybody signs in."""
    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal)

    def ask(self, **changed: str | None) -> Answer:
        return ask(self.app.authorize_url(**changed))

    def test_until_the_client_is_known_and_its_redirect_uri_to_the_letter_nothing_redirects(self) -> None:
        own = self.app.redirect_uri
        wrong: list[dict[str, Any]] = [{"client_id": "nobody"}, {"client_id": None}]
        for uri in (None, "https://evil.example/", own + "&x", own + "/..", own + "#", own.upper(), " " + own,
                    own.replace("https:", "http:"), own.replace(".example", ".example.evil"), own + "\0",
                    own.replace("app.", "evil@app."), own.replace("//", "/\\"), own + "\r\n"):
            wrong.append({"redirect_uri": uri})
        for changed in wrong:
            got = self.ask(**changed)
            self.assertEqual((got.status, "location" in got.headers), (400, False), changed)

    def test_what_waits_for_the_users_decision_is_bounded(self) -> None:
        for name in ("state", "nonce", "login_hint"):
            for value, status in (("é" * 4096, 303), ("é" * 4096 + "x", 400)):
                with self.subTest(name=name, length=len(value)):
                    got = self.ask(**{name: value})
                    self.assertEqual((got.status, "location" in got.headers), (status, status == 303))
        self.assertIn("login_hint is longer than 8 KiB", got.text)
        app = App(self.portal, redirect_uris=[self.app.redirect_uri + "x" * 8192])
        self.assertEqual(ask(app.authorize_url()).status, 400)

    def test_of_those_that_wait_for_a_decision_the_newest_are_kept(self) -> None:
        with mock.patch.object(s4s, "MAX_PENDING", 3), s4s.Server() as portal:
            app, browser = App(portal), Browser(portal)
            waiting = [ask(app.authorize_url()).headers["location"] for _ in range(5)]
            browser.sign_in()
            self.assertEqual([browser.open(page).status for page in waiting], [400, 400, 200, 200, 200])
            self.assertEqual(len(portal.portal.state.rows("SELECT * FROM pending")), 3)

    def test_everything_else_goes_back_to_the_app(self) -> None:
        evil, launch = "https://evil.example/api/fhir", "launch patient/*.rs"
        for error, requests in (
                ("invalid_request", (
                    {"response_type": None}, {"response_mode": "form_post"}, {"scope": None}, {"aud": evil},
                    {"aud": "/"}, {"code_challenge_method": None}, {"code_challenge_method": "plain"},
                    {"code_challenge": "short"}, {"code_challenge": None}, {"max_age": "soon"},
                    {"prompt": "none login"}, {"scope": "launch"}, {"scope": launch, "launch": "unknown"})),
                ("invalid_scope", ({"scope": "nonsense"}, {"scope": 'patient/*.rs "'},
                                   {"scope": "system/*.rs"}, {"scope": "patient/Bundle.rs"})),
                ("unsupported_response_type", ({"response_type": "token"},)),
                ("invalid_target", ({"aud": None, "resource": evil},)),
                ("login_required", ({"prompt": "none"},)), ("request_not_supported", ({"request": "x"},)),
                ("request_uri_not_supported", ({"request_uri": "x"},)),
                ("registration_not_supported", ({"registration": "{}"},))):
            for changed in requests:
                with self.subTest(changed=changed):
                    got = self.ask(**changed)
                    told = [got.location.get(name) for name in ("error", "state", "iss")]
                    self.assertEqual((got.status, told), (303, [error, self.app.state, None]))
                    self.assertTrue(got.headers["location"].startswith(self.app.redirect_uri + "&"))
                    self.assertRegex(got.location["error_description"], r"^[ !#-\[\]-~]+$")

    def test_what_was_dropped_of_a_scope_and_why_is_in_the_log(self) -> None:
        own = "launch patient/Patient.rs user/*.rs offline_access"
        asked = f"{own} patient/Condition.rs system/*.rs user/Slot.rs patient/Patient.rds online_access"
        with s4s.Server(verbose=True) as portal:
            lines, app = log_of(portal), App(portal, own, grant_types=["authorization_code"])
            self.assertEqual(ask(app.authorize_url(scope=asked)).status, 303)
            token = app.tokens(scope="patient/Patient.rs")
            self.assertEqual([ask(portal.url + path, token=token).status for path in (
                "/api/fhir/Patient", "/oauth/userinfo")], [200, 403])
        limit = f": the client registered for {own!r}: add it to the registration or to --fixtures"
        for told in ("launch: no launch came with it", "system/*.rs: for backend services",
                     "user/Slot.rs: of no type that is served", "patient/Patient.rds: granted in part",
                     "online_access: unknown here", "patient/Condition.rs" + limit,
                     "offline_access: the client did not register for refresh_token"):
            self.assertIn(f"scope: dropped {told}", "\n".join(lines))
        self.assertIn("it would take openid" + limit, lines[-1])

    def test_a_constraint_that_no_search_takes_is_refused_by_name_not_dropped(self) -> None:
        for word, fine in (
                ("patient/Observation.rs?_tag=x", False), ("patient/Observation.rs?birthdate=2000", False),
                ("patient/Observation.rs?date=soon", False), ("patient/*.rs?nonsense=x", False),
                *((f"patient/Observation.rs{bad}", False) for bad in (
                    "?code:in=x", "?subject.name=x", "?_filter=x", "?")),
                ("patient/*.rs?birthdate=2000", True), ("patient/Observation.rs?date=ge2000", True),
                ("user/Patient.rs?birthdate=x", False)):
            with self.subTest(word=word):
                app = App(self.portal, "launch/patient patient/*.rs user/*.rs")
                back = ask(app.authorize_url(scope="launch/patient " + word)).location
                self.assertEqual(back.get("error"), None if fine else "invalid_scope")
                self.assertIn(word if not fine else "", back.get("error_description", ""))
                wanted = {"client_id": app.client_id, "username": "daniel-adams", "scope": word}
                self.assertEqual(self.post("/oauth/debug/token", wanted).status, 200 if fine else 400)
        service = KeyedApp(self.portal)
        self.assertEqual(service.token(scope="system/Patient.rs?code=x").json["error"], "invalid_scope")

    def test_a_parameter_given_twice_is_refused(self) -> None:
        for name, status in (("scope", 303), ("nonce", 303), ("anything", 303), ("client_id", 400),
                             ("redirect_uri", 400)):
            got = ask(self.app.authorize_url(**{name: self.app.scope}) + f"&{name}=x")
            told = "error=invalid_request" in got.headers.get("location", "")
            self.assertEqual((got.status, told), (status, status == 303), name)

    def test_state_is_required_and_comes_back_as_it_was_and_no_value_breaks_out_of_the_address(self) -> None:
        got, bad = self.ask(state=None), "a\r\nSet-Cookie: x=y\r\n\r\n<html>&code=stolen#\u20ac"
        self.assertEqual((got.location["error"], "state" in got.location), ("invalid_request", False))
        for state in ("a;b", "a b+c%20", "\u00e9\u4e2d", "x&y=z#?", "'\"<>", bad):
            for changed in ({"scope": bad}, {"aud": bad}, {"response_type": bad}, {"prompt": "none " + bad}):
                with self.subTest(state=state, changed=changed):
                    got = self.ask(state=state, **changed)
                    self.assertEqual((got.location["state"], got.cookies), (state, []))
                    self.assertNotIn("code", got.location)
                    self.assertRegex(got.headers["location"].partition("?")[2], r"^[A-Za-z0-9._~%&=-]+$")
        back = self.portal.approve(self.app.authorize_url(state=bad), "daniel-adams")
        for url in (self.ask(state=bad).headers["location"], back):
            self.assertRegex(url, r"^[!-~]+$")

    def test_a_posted_request_is_the_same(self) -> None:
        url, _, query = self.app.authorize_url().partition("?")
        got = ask(url, form=parse_qsl(query))
        self.assertEqual(got.status, 303)
        self.assertIn("/oauth/consent?request=", got.headers["location"])
        self.assertNotIn("app.example", got.headers["location"], "the app's redirect URI in our own address")

    def test_the_fhir_base_may_be_named_with_a_slash_and_by_any_name_of_loopback(self) -> None:
        port = self.portal.port
        for host, slash in (("localhost", ""), ("127.0.0.1", "/"), ("[::1]", "")):
            for name in ("aud", "resource"):
                with self.subTest(host=host, name=name):
                    named: Any = {"aud": None, name: f"http://{host}:{port}/api/fhir{slash}"}
                    given = self.app.tokens(**named)["access_token"]
                    self.assertEqual(introspected(self.app, given)["iss"], f"http://{host}:{port}")
        for aud in (f"http://localhost:{port + 1}/api/fhir", f"https://localhost:{port}/api/fhir",
                    self.portal.url):
            self.assertEqual(self.ask(aud=aud).location["error"], "invalid_request", aud)

    def test_prompt_none_never_shows_a_page_and_login_or_max_age_asks_to_sign_in_again(self) -> None:
        browser = signed_in(self.portal)
        self.portal.advance(100)
        for changed, error in (({}, "consent_required"), ({"max_age": "200"}, "consent_required"),
                               ({"max_age": "50"}, "login_required")):
            got = browser.open(self.app.authorize_url(prompt="none", **changed))
            self.assertEqual(got.location.get("error"), error, changed)
        for changed, again in (({"max_age": "200"}, False), ({"max_age": "50"}, True),
                               ({"prompt": "login"}, True)):
            page = browser.open(self.app.authorize_url(**changed))
            self.assertEqual("Sign in" in page.text, again, changed)
        self.assertIn("Whose record?", browser.sign_in().text)
        page = Browser(self.portal).open(self.app.authorize_url(login_hint="joseph-ross"))
        self.assertIn('value="joseph-ross"', page.text)

    def test_what_a_client_did_not_register_for_it_does_not_get(self) -> None:
        self.app = App(self.portal, grant_types=["client_credentials"])
        self.assertEqual(self.ask().location["error"], "unauthorized_client")
        tokens = App(self.portal, grant_types=["authorization_code"]).tokens()
        self.assertEqual(("refresh_token" in tokens, tokens["scope"]), (False, "launch/patient patient/*.rs"))

    def test_a_public_client_needs_pkce_unless_told_and_then_a_challenge_binds(self) -> None:
        plain: Any = {"code_challenge": None, "code_challenge_method": None}
        back = ask(App(self.portal, token_endpoint_auth_method="none").authorize_url(**plain)).location
        self.assertEqual(back.get("error"), "invalid_request")
        self.assertIn("--no-pkce", back["error_description"])
        with s4s.Server(pkce=False) as portal:
            for app in (App(portal, token_endpoint_auth_method="none"),
                        App(self.portal, token_endpoint_auth_method="client_secret_post")):
                code = app.code(**plain, aud=None)
                self.assertEqual(app.exchange(code).json["error"], "invalid_grant", "a verifier unasked")
                self.assertEqual(app.exchange(code, code_verifier="").status, 200)
            app = App(portal, token_endpoint_auth_method="none")
            code = app.code()
            self.assertEqual(app.exchange(code, code_verifier="").json["error"], "invalid_grant", "stolen")
            self.assertEqual(app.exchange(code).status, 200)
            # A native app: whoever listens on another port would get its code.
            app = App(portal, redirect_uris=["http://127.0.0.1/cb"], token_endpoint_auth_method="none")
            for uri, changed, status in (("http://127.0.0.1:51004/cb", plain, 400),
                                         ("http://127.0.0.1:51004/cb", {}, 303),
                                         ("http://127.0.0.1/cb", plain, 303)):
                got = ask(app.authorize_url(redirect_uri=uri, **changed))
                self.assertEqual(got.status, status, (uri, changed))

    def test_strict_requires_pkce_and_aud_and_alone_says_in_the_redirect_who_answers(self) -> None:
        """Elsewhere an app whose redirect and launch page are one would take iss for an EHR's launch."""
        flag = "authorization_response_iss_parameter_supported"
        documents = ".well-known/oauth-authorization-server", "api/fhir/.well-known/smart-configuration"
        for strict in (True, False):
            with self.subTest(strict=strict), s4s.Server(strict=strict) as portal:
                app = App(portal)
                self.assertEqual([ask(f"{portal.url}/{path}").json[flag] for path in documents], [strict] * 2)
                for back in (portal.approve(app.authorize_url(), "daniel-adams"),
                             portal.approve(app.authorize_url(), "daniel-adams", deny=True),
                             ask(app.authorize_url(scope="nonsense")).headers["location"]):
                    self.assertEqual(query_of(back).get("iss"), portal.url if strict else None, back)
                for left_out in (("code_challenge", "code_challenge_method"), ("aud",)) if strict else ():
                    told = ask(app.authorize_url(**dict.fromkeys(left_out))).location
                    self.assertEqual(told["error"], "invalid_request")
                    self.assertIn(left_out[0], told["error_description"])
                    self.assertNotIn("--no-pkce", told["error_description"])  # not possible together
                self.assertEqual(app.exchange(app.code()).status, 200)


class SeveralNames(PortalTest):
    """Several base URLs: each app lives under the name it knows."""
    settings: ClassVar[dict[str, Any]] = {"base_url": ["http://Portal.Example:80", "http://smart:8000/"]}

    def test_addresses_are_in_the_name_that_was_asked_and_the_browsers_in_the_first(self) -> None:
        url, first = f"{self.portal.address}/.well-known/openid-configuration", "http://portal.example"
        for host, base in (("smart:8000", "http://smart:8000"), ("portal.example", first),
                           ("localhost", first), ("Smart:8000", "http://smart:8000"),
                           ("portal.example:443", first)):  # some clients name the scheme's own port
            with self.subTest(host=host):
                document = ask(url, headers={"Host": host}).json
                names = ("issuer", "token_endpoint", "authorization_endpoint")
                self.assertEqual([document[name] for name in names],
                                 [base, base + "/oauth/token", first + "/oauth/authorize"])

    def test_the_issuer_of_a_grant_is_the_name_that_aud_used(self) -> None:
        set_signing_key(self.portal)
        app = App(self.portal, "openid fhirUser launch/patient patient/*.rs")
        claims = s4s.read_jwt(app.tokens(aud="http://smart:8000/api/fhir")["id_token"]).claims
        self.assertEqual((claims["iss"], claims["fhirUser"]),
                         ("http://smart:8000", f"http://smart:8000/api/fhir/Patient/{DANIEL}"))

    def test_the_issuer_is_spelled_as_this_server_spells_it(self) -> None:
        with s4s.Server(base_url="http://localhost:8123", strict=True) as portal:
            url = App(portal).authorize_url(aud="http://127.0.0.1:8123/api/fhir/")
            back = portal.approve(url, username="daniel-adams")
        self.assertEqual(query_of(back)["iss"], "http://localhost:8123")


# ######################################################################## 9 consent, and the code

def at_once(count: int, action: Callable[[], Any]) -> list[Any]:
    """What so many threads get that do the same at the same time."""
    gate = threading.Barrier(count)

    def run(_: int) -> Any:
        gate.wait(10)
        return action()
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


class CodeFlow(PortalTest):
    """From the app's request to its tokens, through the pages."""
    def setUp(self) -> None:
        super().setUp()
        self.app, self.browser = App(self.portal), Browser(self.portal)

    def to_consent(self) -> None:
        """A new browser, as far as the consent page for Daniel's record."""
        self.browser = signed_in(self.portal, self.app.authorize_url())
        self.browser.submit(DANIEL)

    def approve(self, **changed: Any) -> Answer:
        return self.browser.submit("authorize", **changed)

    def approved(self, **changed: Any) -> Any:
        return self.app.exchange(self.approve(**changed).location["code"]).json

    def test_sign_in_choose_approve_exchange_read_or_deny(self) -> None:
        page = self.browser.open(self.app.authorize_url())
        self.assertEqual((page.status, "Sign in" in page.text), (200, True))
        self.assertIn(f'data-patient-id="{AMY}"', self.browser.sign_in().text)
        self.assertIn("Amy Shaw", self.browser.submit(AMY).text)
        back = self.approve()
        self.assertTrue(back.headers["location"].startswith("https://app.example/cb?own=1&"))
        self.assertEqual(back.location["state"], self.app.state)
        tokens = self.app.exchange(back.location["code"])
        self.assertEqual((tokens.status, tokens.json["patient"]), (200, AMY))
        self.assertEqual(self.fhir(f"Patient/{AMY}", tokens.json).status, 200)
        self.to_consent()
        back = self.browser.submit("deny")
        self.assertEqual((back.location["error"], back.location["state"]), ("access_denied", self.app.state))

    def test_only_the_categories_left_checked_are_shared(self) -> None:
        self.to_consent()
        tokens = self.approved(without="security_labels", security_labels="medications")
        self.assertEqual(self.fhir(f"MedicationRequest?patient={DANIEL}", tokens).status, 200)
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", tokens).status, 404)
        self.assertNotIn("entry", self.fhir(f"Condition?patient={DANIEL}", tokens).json)

    def test_the_scope_granted_is_what_the_person_chose(self) -> None:
        five = ["Patient", "Observation", "Condition", "Immunization", "MedicationRequest"]
        seen, final = "patient/Observation.rs", "user/Observation.s?status=final"
        both, report = f"{seen}?category=vital-signs,laboratory", "patient/DiagnosticReport.r"
        unsaid = f"openid patient/*.rs patient/Observation.read user/Immunization.read {report}"
        all_of_them = "vital-signs laboratory smoking other"
        many = " ".join(f"{seen}?code={number}" for number in range(200))
        for version, left, asked, granted in (
                *((version, "patient problems laboratory", " ".join(f"patient/{name}.rs" for name in five),
                   f"patient/Patient.rs {seen}?category=@|laboratory patient/Condition.rs")
                  for version in ("dstu2", "stu3", "r4")),
                ("r4", "vital-signs smoking", f"{final} patient/Practitioner.rs", " ".join((
                    f"{final}&category=@|vital-signs", f"{final}&category=@|social-history",
                    f"{final}&code=http://loinc.org|72166-2", "patient/Practitioner.rs"))),
                ("r4", "laboratory", f"{both} {seen}?category=@|vital-signs {seen}?category=LAB {report}",
                 f"{both}&category=@|laboratory {seen}?category=LAB {report}"),
                ("r4", "laboratory", f"{report}?category=LAB {report}?category=radiology",
                 f"{report}?category=LAB"),
                ("r4", "laboratory other", f"{seen} patient/Goal.rs patient/Coverage.rs",
                 f"{seen} patient/Goal.rs"),
                ("r4", "laboratory", unsaid, unsaid), ("r4", all_of_them, seen, seen),
                ("r4", "laboratory", f"patient/Goal.rs {many}", many)):
            hl7 = "http://terminology.hl7.org/CodeSystem/" if version == "r4" else "http://hl7.org/fhir/"
            asked, granted = (text.replace("@|", hl7 + "observation-category|") for text in (asked, granted))
            with self.subTest(version, left=left, asked=asked), s4s.Server(fhir_version=version) as portal:
                set_signing_key(portal)
                app = App(portal, f"launch/patient offline_access {asked}")
                tokens = app.tokens(patient_id=ME, security_labels=left.split())
                apps = Page(signed_in(portal, "/apps").open(portal.url + "/apps").text)
                mine = ask(portal.url + "/api/me", token=tokens["access_token"]).json["tokens"]
                told = {tokens["scope"], introspected(app, tokens["access_token"])["scope"],
                        app.refresh(tokens["refresh_token"]).json["scope"],
                        apps.texts["details"][0].partition("Scope")[2], *(token["scope"] for token in mine)}
                self.assertEqual(told, {f"launch/patient offline_access {granted}"})

    def test_a_form_that_says_too_little_or_too_much_is_refused(self) -> None:
        for why, changed in (("no category", {"without": "security_labels"}),
                ("none of ours", {"without": "security_labels", "security_labels": "everything"}),
                ("past", {"approval_expires": "2020-01-01"}), ("far", {"approval_expires": "2999-01-01"}),
                ("no date", {"approval_expires": "tomorrow"}), ("empty", {"approval_expires": ""}),
                *(("a week", {"approval_expires": f"{s4s.day_of(time.time(), 1)[:4]}-W01{day}"})
                  for day in ("", "-1")),
                ("a visit unasked", {"encounter_id": "visit-1"})):
            with self.subTest(why):
                self.to_consent()
                self.assertEqual(self.approve(**changed).status, 400)
        self.app = App(self.portal, "launch/patient patient/Condition.rs")
        self.to_consent()
        self.assertEqual(self.approve(security_labels="laboratory").status, 400, "a category not offered")

    def test_who_has_no_choice_of_records_is_not_asked(self) -> None:
        for username, scope, asked in (("daniel-adams", "patient/*.rs", True),
                ("daniel-adams", "launch/patient", True), ("joseph-ross", "patient/*.rs", False),
                ("daniel-adams", "user/*.rs", False), ("clinician", "patient/*.rs", True),
                ("clinician", "launch/patient", True), ("clinician", "user/*.rs", False)):
            with self.subTest(username=username, scope=scope):
                app = App(self.portal, "launch/patient patient/*.rs user/*.rs")
                page = signed_in(self.portal, app.authorize_url(scope=scope), username).page
                self.assertEqual("Whose record?" in page.text, asked)

    def test_a_user_without_a_record_approves_without_one(self) -> None:
        visitor = {"username": "visitor", "password": "visitor-password", "name": "A visitor", "patients": []}
        with s4s.Server(fixtures={"users": [visitor]}) as portal:
            tokens = App(portal, "user/*.rs").tokens(username="visitor")
        self.assertEqual(("access_token" in tokens, "patient" in tokens), (True, False))

    def test_a_record_that_is_not_the_users_is_refused(self) -> None:
        self.browser = signed_in(self.portal, self.app.authorize_url())
        self.assertEqual(self.browser.submit(DANIEL, patient_id=JOSEPH).status, 400, "given twice")
        for decision in ("", "approve"):
            self.assertIn("Whose record?", self.browser.open(self.app.authorize_url()).text)
            page = self.browser.submit(patient_id=JOSEPH, decision=decision)
            self.assertEqual((page.status, "may not open the record" in page.text), (403, True))
        self.assertIn("Whose record?", self.browser.open(self.app.authorize_url()).text)
        self.assertEqual(self.browser.submit(patient_id=AMY).status, 200)

    def test_a_link_to_the_consent_page_decides_nothing(self) -> None:
        self.to_consent()
        sent, url = urlencode(Form(self.browser.page.text).fields), self.browser.url.partition("?")[0]
        for decision in ("approve", "deny"):
            page = self.browser.open(f"{url}?{sent}&decision={decision}")
            self.assertEqual((page.status, "location" in page.headers), (200, False))
        self.assertIn("code", self.approve().location)

    def test_a_request_is_answered_once_and_within_half_an_hour(self) -> None:
        self.to_consent()
        page, url = self.browser.page, self.browser.url
        self.approve()
        self.browser.page, self.browser.url = page, url
        self.assertEqual(self.approve().status, 400)
        self.browser = Browser(self.portal)
        self.browser.open(self.app.authorize_url())
        self.portal.advance(1801)
        self.assertEqual(self.browser.sign_in().status, 400)

    def test_of_two_clicks_at_once_one_gets_a_code(self) -> None:
        self.to_consent()
        fields, url = Form(self.browser.page.text).fields + [("decision", "approve")], self.browser.url
        real, gate = s4s.new_grant, threading.Barrier(2)

        def both_at_once(*given: Any) -> Any:
            gate.wait(10)  # both have found the request open
            return real(*given)
        with mock.patch.object(s4s, "new_grant", both_at_once):
            answers = at_once(2, lambda: ask(url, form=fields, headers=self.browser.headers).status)
        self.assertEqual(sorted(answers), [303, 400])


class AppsPage(PortalTest):
    """GET /apps and stopping to share (S4S)."""
    def setUp(self) -> None:
        super().setUp()
        self.app, self.browser = App(self.portal), signed_in(self.portal, "/apps")

    def stop_sharing(self, form: int = 0) -> None:
        """Click twice: the page asks once more."""
        self.browser.submit("Stop sharing", form=form)
        self.assertIn('class="modal in"', self.browser.page.text)
        self.browser.submit("Stop sharing")

    def test_stopping_ends_the_apps_authorizations_for_that_patient_and_codes_alone(self) -> None:
        code, first, second = self.app.code(), self.app.tokens(), self.app.tokens()
        daughters, others = self.app.tokens(patient_id=AMY), App(self.portal).tokens()
        page = self.browser.open(self.portal.url + "/apps")
        self.assertEqual(page.text.count(f'rel="{self.app.client_id}"'), 2)  # a row for each patient
        rows = page.text.split("<tr rel=")[1:]
        self.stop_sharing([self.app.client_id in row and "Daniel Adams" in row for row in rows].index(True))
        for tokens, status in ((first, 401), (second, 401), (daughters, 200), (others, 200)):
            self.assertEqual(self.fhir(f"Patient/{tokens['patient']}", tokens).status, status)
        for got in (self.app.exchange(code), self.app.refresh(first["refresh_token"])):
            self.is_error(got, words="revoked")

    def test_it_says_whose_sharing_a_button_stops_and_marks_the_row_in_question(self) -> None:
        for patient in (DANIEL, AMY):
            self.app.tokens(patient_id=patient)
        page = Page(self.browser.open(self.portal.url + "/apps").text)
        self.assertEqual(page.texts["button"][1:], [
            f"Stop sharing with {self.app.client_id}: {who}" for who in ("Amy Shaw", "Daniel Adams")])
        rows = self.browser.submit("Stop sharing", form=1).text.split("<tr")[2:]
        self.assertEqual(['aria-current="true"' in row for row in rows], [False, True])

    def test_whoever_was_signed_out_meanwhile_comes_back_to_a_page(self) -> None:
        self.app.tokens()
        self.browser.open(self.portal.url + "/apps")
        self.browser.submit("Stop sharing")
        self.portal.advance(s4s.SESSION_SECONDS + 1)
        self.browser.submit("Stop sharing")
        self.assertEqual(self.browser.submit("sign-in").status, 200)
        self.assertEqual(urlsplit(self.browser.url).path, "/apps")

    def test_nobody_stops_sharing_for_somebody_else(self) -> None:
        mine, theirs = self.app.tokens(), self.app.tokens(username="clinician", patient_id=DANIEL)
        self.browser.open(self.portal.url + "/apps")
        self.browser.submit("Stop sharing")
        form, row = Form(self.browser.page.text), self.portal.portal.state.row(
            "SELECT grant_id FROM grants WHERE username = 'clinician'")
        assert row
        url = f"{self.portal.url}/revoke/{row['grant_id']}"
        self.assertEqual(self.browser.open(url, "POST", form.fields).status, 404)
        self.browser.open(self.portal.url + "/apps")
        self.stop_sharing()
        for tokens, status in ((mine, 401), (theirs, 200)):
            self.assertEqual(self.fhir(f"Patient/{DANIEL}", tokens).status, status)


class WhoseRecordBehind(ForwardingTest):
    """Choosing patient and visit where the records are a FHIR server's."""
    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal, "launch/patient launch/encounter patient/*.rs")
        self.browser = Browser(self.portal)
        jo = made("Patient/p2", name=[{"given": ["Jo"], "family": "Do"}])
        self.script("/fhir/Patient?_count=50", [
            {**jo, "id": f"pia{number}", "name": [{"text": "Pia"}]} for number in range(20)])
        self.script("/fhir/Patient?name=jo&_count=50", [jo])
        self.behind.records["Patient/p2"] = jo

    def test_a_clinician_finds_a_patient_by_name(self) -> None:
        self.browser.open(self.app.authorize_url())
        self.assertIn('data-patient-id="pia1"', self.browser.sign_in("clinician").text)
        self.assertNotIn("Pia", self.browser.submit("Search", q="jo").text)
        self.assertIn("health record of Jo Do", self.browser.submit("p2", form=1).text)
        back = self.browser.submit("authorize").location
        self.assertEqual(self.app.exchange(back["code"]).json["patient"], "p2")

    def test_the_picker_shows_birth_dates_from_there_and_does_without_them_too(self) -> None:
        born: Any = [made(f"Patient/{ME}", birthDate="1925-12-23")]
        for answer, status, words in (
                (born, 200, "born 1925-12-23"), (b"<html>", 503, "born on a day that is not known")):
            self.script("Patient", answer, status)
            page = signed_in(self.portal, self.app.authorize_url()).page
            self.assertEqual(Page(page.text).texts["button"][1], f"Daniel Adamsyour own record; {words}")

    def test_the_launcher_finds_patients_there_too(self) -> None:
        self.assertIn("pia1", self.browser.open(self.portal.url + "/launch").text)
        text = self.browser.open(self.portal.url + "/launch?name=jo").text
        self.assertIn('<option value="p2">Jo Do</option>', text)
        self.assertNotIn("Pia", text)

    def test_a_visit_of_the_patients_own_is_chosen(self) -> None:
        self.script("Encounter", [
            made(f"Encounter/{name}", subject=to(f"{base}Patient/{patient}"), period={"start": day})
            for name, base, patient, day in (
                ("old", "", ME, "2020-01-01"), ("theirs", "", OTHER, "2022-01-01"),
                ("new", f"{self.behind.url}/", ME, "2021-01-01"), ("", "", ME, "2023-01-01"))])
        self.assertEqual(self.app.tokens()["encounter"], "new")
        for visit in ("theirs", "none"):
            with self.assertRaises(s4s.PortalError):
                self.app.code(encounter_id=visit)

    def test_a_patient_whom_the_server_does_not_have_is_said_and_while_it_is_down_all_goes_on(self) -> None:
        del self.behind.records[f"Patient/{ME}"]
        with self.assertRaisesRegex(s4s.PortalError, f"has no Patient/{ME}"):
            self.app.code(patient_id=ME)
        self.app.scope = "launch/patient patient/*.rs"
        self.script(f"Patient/{ME}", b"<html>", 503)
        self.assertEqual(self.app.tokens(patient_id=ME)["patient"], ME)

    def test_while_it_is_down_the_list_of_apps_comes_and_sharing_stops(self) -> None:
        token = self.issue(self.scope, username="clinician", patient_id="p2")
        with mock.patch.object(self.upstream, "ask", side_effect=s4s.refused("is down")):
            browser = signed_in(self.portal, "/apps", "clinician")
            for _ in ("the row's button", "the question's"):
                self.assertIn(": p2", browser.page.text)
                self.assertEqual(browser.submit("Stop sharing").status, 200)
            self.assertEqual(self.get("Patient/p2", token=token).status, 401)
            for path, words in (("/", "Welcome, "), ("/apps", "share with no app"), ("/login", "Password")):
                self.assertIn(words, browser.open(self.portal.url + path).text)

    def test_only_what_can_be_an_id_is_asked_for_and_only_that_patient_is_taken_for_it(self) -> None:
        for patient_id in ("_search", "..", "..%2fadmin", "$everything", "a/b?c", "a,b", "x" * 65):
            self.script(f"Patient/{quote(patient_id, safe='')}", made("Bundle"))
            self.behind.seen.clear()
            with self.subTest(patient_id), self.assertRaisesRegex(s4s.PortalError, "is not a patient of"):
                self.issue(self.scope, username="clinician", patient_id=patient_id)
            chosen = quote(patient_id, safe="")
            self.assertEqual(self.browser.open(f"{self.portal.url}/launch?patient_id={chosen}").status, 200)
            self.assertEqual({target for target, *_ in self.behind.seen}, {"/fhir/Patient?_count=50"})
        for answer in (made("Bundle/p2"), made("Patient/p3"), made("Patient")):
            self.script("Patient/p2", answer)
            with self.subTest(answer), self.assertRaisesRegex(s4s.PortalError, "another resource"):
                self.issue(self.scope, username="clinician", patient_id="p2")


# ######################################################################## 10 tokens

def introspected(app: App, token: str) -> Any:
    pair = (app.client_id, app.secret)
    return ask(app.portal.address + "/oauth/introspect", form={"token": token}, basic=pair).json


class TokenTest(PortalTest):
    """Tests of the token endpoint have an app, and words for a refusal."""
    def setUp(self) -> None:
        super().setUp()
        self.app = App(self.portal)
        self.public = App(self.portal, token_endpoint_auth_method="none")

    def revoke(self, token: str, app: App | None = None) -> None:
        app = app or self.app
        got = self.at("/oauth/revoke", form={"token": token}, basic=(app.client_id, app.secret))
        self.assertEqual((got.status, got.json), (200, {}))

    def opens(self, token: Any, opens: bool = True) -> None:
        """Whether a token (response) opens Daniel's record."""
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", token).status, 200 if opens else 401)


class TokenEndpoint(TokenTest):
    """POST /oauth/token (RFC 6749)."""
    def test_the_answer_is_not_cached_and_says_what_was_granted(self) -> None:
        got = self.app.exchange(self.app.code())
        self.assertEqual((got.headers["cache-control"], got.headers["pragma"]), ("no-store", "no-cache"))
        self.assertEqual((got.json["token_type"], got.json["expires_in"], got.json["scope"]),
                         ("Bearer", 3600, self.app.scope))
        self.assertNotIn("refresh_token", self.app.tokens(scope="launch/patient patient/*.rs"))

    def test_how_long_access_tokens_last_is_said_at_the_start_and_for_one_authorization(self) -> None:
        """Apps in browsers refresh by their own clock, which advance does not move."""
        tries: Any = ((None, None), (5, 5), ("5.5", 5), (0, 0), (9000, 9000))
        for lifetime, service in ((3600, 300), (20, 20), (7200, 300)):
            with self.subTest(lifetime), s4s.Server(token_lifetime=lifetime) as portal:
                app = App(portal)
                self.assertEqual(portal.issue_token()["expires_in"], lifetime)
                self.assertEqual(portal.issue_token(access_lifetime=7)["expires_in"], 7)
                self.assertEqual(KeyedApp(portal).token().json["expires_in"], service)
                for said, seconds in tries:
                    given = app.tokens(access_lifetime=said)
                    later = app.refresh(given["refresh_token"]).json
                    expected = [lifetime if seconds is None else seconds] * 2
                    self.assertEqual([given["expires_in"], later["expires_in"]], expected, said)
        bad: Any
        for bad in ("soon", True, "nan", 1e15, []):
            with self.subTest(bad=bad), self.assertRaisesRegex(s4s.PortalError, "access_lifetime: exp"):
                self.app.code(access_lifetime=bad)
        for bad in (0, -1, "20", math.nan, 1e9):
            with self.subTest(bad=bad), self.assertRaisesRegex(s4s.StartError, "--token-lifetime"):
                s4s.Server(token_lifetime=bad)

    def test_of_many_uses_at_once_of_a_code_or_a_refresh_token_one_wins_and_then_all_ends(self) -> None:
        code = self.app.code()
        self.assertEqual(sorted(at_once(16, lambda: self.app.exchange(code).status)), [200] + [400] * 15)
        token = self.app.tokens()["refresh_token"]
        self.assertEqual(sorted(at_once(8, lambda: self.app.refresh(token).status)), [200] + [400] * 7)
        rows = self.portal.portal.state.rows("SELECT client_id, ended FROM grants")
        self.assertEqual([tuple(row) for row in rows], [(self.app.client_id, 1)] * 2)

    def test_a_code_lasts_a_minute_and_used_again_ends_what_it_gave_even_long_after(self) -> None:
        for seconds in (0, 1000):
            with self.subTest(seconds=seconds):
                code = self.app.code()
                tokens = self.app.exchange(code).json
                self.portal.advance(seconds)
                self.app.code()  # old rows are forgotten now
                self.is_error(self.app.exchange(code), words="used before")
                self.opens(tokens, False)
        code = self.app.code()
        self.portal.advance(61)
        self.is_error(self.app.exchange(code), words="expired")

    def test_a_stolen_code_is_worth_nothing_without_its_verifier(self) -> None:
        app = self.public  # its id is no secret
        code = app.code()
        for guess in ("", "x" * 43, app.verifier[:-1], app.verifier + "a"):
            self.is_error(app.exchange(code, code_verifier=guess), words="code_verifier")
        self.assertEqual(app.exchange(code).status, 200, "a thief that fails uses nothing up")

    def test_a_verifier_short_enough_to_guess_is_refused_though_it_matches(self) -> None:
        for verifier, status in (("v" * 42, 400), ("v" * 43, 200), ("v" * 128, 200), ("v" * 129, 400),
                                 ("v" * 42 + "+", 400)):
            self.app.verifier = verifier
            self.assertEqual(self.app.exchange(self.app.code()).status, status)

    def test_a_code_of_another_client_buys_nothing(self) -> None:
        thief, code = App(self.portal), self.app.code()
        thief.verifier = self.app.verifier  # it knows this too, and has the same redirect URI
        self.is_error(thief.exchange(code), words="not issued to this client")
        self.assertEqual(self.app.exchange(code).status, 200)

    def test_a_code_is_bound_to_the_redirect_uri_it_was_sent_to(self) -> None:
        code = self.app.code()
        for uri in ("https://app.example/other", ""):
            self.is_error(self.app.exchange(code, redirect_uri=uri), words="redirect_uri")
        self.assertEqual(self.app.exchange(code).status, 200)

    def test_a_code_an_access_token_and_a_refresh_token_do_not_stand_for_each_other(self) -> None:
        code, tokens = self.app.code(), self.app.tokens()
        for value in (code, tokens["access_token"]):
            self.is_error(self.app.refresh(value), words="refresh_token was not issued")
        for value in (tokens["access_token"], tokens["refresh_token"]):
            self.is_error(self.app.exchange(value), words="code was not issued")
        for value in (code, tokens["refresh_token"]):
            self.opens(value, False)
        self.assertEqual(introspected(self.app, code), {"active": False})
        self.revoke(code)
        self.assertEqual(self.app.exchange(code).status, 200)

    def test_refresh_tokens_rotate_and_one_used_twice_ends_the_authorization(self) -> None:
        first = self.app.tokens()
        second = self.app.refresh(first["refresh_token"]).json
        self.assertNotEqual(first["refresh_token"], second["refresh_token"])
        self.assertEqual(second["patient"], DANIEL)
        self.opens(first)  # earlier access tokens live on
        self.opens(second)
        self.is_error(self.app.refresh(first["refresh_token"]), words="used before")
        self.opens(second, False)
        self.is_error(self.app.refresh(second["refresh_token"]), words="revoked")

    def test_a_refresh_may_narrow_the_scope_and_never_widen_it_and_fails_without_effect(self) -> None:
        tokens = self.app.tokens(scope="launch/patient patient/Observation.rs offline_access")
        value = tokens["refresh_token"]
        for got in (App(self.portal).refresh(value), self.app.refresh("x")):
            self.is_error(got)
        for scope, words in (("user/*.rs", "not granted"), ("patient/*.rs", "not granted"),
                             ("patient/Observation.rs openid", "not granted"), ("patient/*.rs?a:b=c", ""),
                             ("patient/Observation.c", ""), ("patient/Observation.write", ""),
                             ("patient/Foo.rs", "not granted"),
                             ("patient/Observation.rs?nonsense=1", "no search parameter")):
            self.is_error(self.app.refresh(value, scope=scope), "invalid_scope", words=words)
        self.assertEqual(self.fhir(f"Observation?patient={DANIEL}", tokens).status, 200)
        for scope, granted in (("patient/Observation.r", "patient/Observation.r"),
                               *((f"patient/Observation.{word}", "patient/Observation.read")
                                 for word in ("*", "read", "read patient/Observation.*")),
                               ("patient/Observation.cruds", "patient/Observation.rs"),
                               ("", tokens["scope"]), (tokens["scope"], tokens["scope"])):
            got = self.app.refresh(value, scope=scope).json
            self.assertEqual(got["scope"], granted)
            value = got["refresh_token"]
        whole = self.app.tokens(scope="launch/patient patient/*.rs offline_access")["refresh_token"]
        for scope in ("patient/*.rs patient/Bundle.rs", "patient/*.cu", "patient/*.write"):
            self.is_error(self.app.refresh(whole, scope=scope), "invalid_scope")
        self.assertEqual(self.app.refresh(whole, scope="patient/*.* launch").json["scope"],
                         "patient/*.read launch")

    def test_what_a_person_left_of_a_scope_can_be_asked_for_again(self) -> None:
        for version in s4s.FHIR_VERSIONS:
            with self.subTest(version), s4s.Server(fhir_version=version) as portal:
                app = App(portal, "launch/patient patient/Observation.rs patient/*.read offline_access")
                tokens = app.tokens(security_labels=["smoking", "vital-signs"])
                self.assertIn("patient/Observation.rs?category=", tokens["scope"])
                got = app.refresh(tokens["refresh_token"], scope=tokens["scope"]).json
                self.assertEqual(got["scope"], tokens["scope"])

    def test_what_is_wrong_is_said_with_the_rfcs_code(self) -> None:
        long = {"grant_type": "refresh_token", "refresh_token": "x", "scope": "x" * 9000}
        for error, form in (("unsupported_grant_type", {"grant_type": "not_a_grant_type"}),
                            ("invalid_request", {}), ("invalid_request", {"grant_type": "refresh_token"}),
                            ("invalid_request", {"grant_type": "authorization_code"}),
                            ("invalid_scope", long),
                            ("unauthorized_client", {"grant_type": "client_credentials"}),
                            ("invalid_grant", {"grant_type": "refresh_token", "refresh_token": "nothing"})):
            with self.subTest(form=form):
                got = self.app.token_request(**form)
                self.is_error(got, error)
                self.assertEqual(got.headers["cache-control"], "no-store")
        form = {"grant_type": "not_a_grant_type", "client_id": "nobody"}  # judged before the client
        self.is_error(self.at("/oauth/token", form=form), "unsupported_grant_type")
        got = self.at("/oauth/token")
        self.assertEqual((got.status, "POST" in got.headers["allow"]), (405, True))
        self.assertEqual(self.post("/oauth/token", {"grant_type": "refresh_token"}).status, 415)

    def test_basic_credentials_may_be_form_encoded_first_or_not(self) -> None:
        form = {"grant_type": "refresh_token", "refresh_token": "x"}
        with s4s.Server(client="my_app+1:p%20w/+x=https://app.example/cb?own=1") as portal:
            for pair in (("my_app+1", "p%20w/+x"), ("my_app%2B1", "p%2520w%2F%2Bx")):
                self.is_error(ask(portal.url + "/oauth/token", basic=pair, form=form))

    def test_whether_a_refresh_token_exists_is_told_to_no_other_client(self) -> None:
        theirs = self.public.tokens()["refresh_token"]
        other = App(self.portal, token_endpoint_auth_method="none")
        keyed = KeyedApp(self.portal, grant_types=["refresh_token"], scope="patient/*.rs")

        def by_keys(value: str) -> Answer:
            return keyed.token(grant_type="refresh_token", refresh_token=value)
        for refresh in (self.app.refresh, other.refresh, by_keys):
            got = refresh(theirs)
            self.assertEqual((got.status, got.json), (400, refresh("nothing").json))

    def test_a_refresh_without_a_client_tells_nothing_of_a_token_but_a_public_clients_own(self) -> None:
        app, ended, spent, public = self.app, self.app.tokens(), self.app.tokens(), self.public.tokens()
        self.revoke(ended["refresh_token"])
        app.refresh(spent["refresh_token"])
        keyed = KeyedApp(self.portal, scope="patient/*.rs offline_access").client_id
        for more in ({}, {"client_secret": "guess"}, {"client_assertion_type": s4s.ASSERTION_TYPE},
                     {"client_id": app.client_id}):
            told = []
            for value in ("nothing", app.tokens()["refresh_token"], ended["refresh_token"],
                          spent["refresh_token"], app.tokens()["access_token"], app.code(),
                          self.portal.issue_token(client_id=keyed)["refresh_token"],
                          public["access_token"], self.public.code()):
                form = {"grant_type": "refresh_token", "refresh_token": value, **more}
                got = self.at("/oauth/token", form=form)
                self.is_error(got, "invalid_client", 401)
                told.append(got.json)
            self.assertEqual(told, [told[0]] * 9, more)
        form = {"grant_type": "refresh_token", "refresh_token": public["refresh_token"]}
        self.assertEqual(self.at("/oauth/token", form=form).status, 200)

    def test_a_refresh_token_names_no_client_for_a_code(self) -> None:
        app = self.public
        got = self.at("/oauth/token", form={
            "grant_type": "authorization_code", "code": app.code(), "code_verifier": app.verifier,
            "redirect_uri": app.redirect_uri, "refresh_token": app.tokens()["refresh_token"]})
        self.is_error(got, "invalid_client", 401)

    def test_a_client_narrowed_to_nothing_gets_nothing(self) -> None:
        for scope, granted, status in (("launch/patient patient/Observation.rs", "launch/patient", 403),
                                       ("patient/Observation.rs", "patient/Observation.rs", 200)):
            tokens = App(self.portal, scope, security_labels=["imaging"]).tokens(patient_id=DANIEL)
            got = self.fhir(f"Observation?patient={DANIEL}", tokens)
            self.assertEqual((tokens["scope"], got.status, "entry" in got.json), (granted, status, False))

    def test_expired_rows_are_forgotten(self) -> None:
        app = App(self.portal, "launch/patient patient/*.rs")
        for _ in range(3):
            app.code()
            self.portal.launch(launch_uri="https://app.example/launch")
            ask(app.authorize_url())
            self.portal.advance(2200)
        for table in ("launches", "pending", "tokens"):
            self.assertLessEqual(len(self.portal.portal.state.rows(f"SELECT * FROM {table}")), 1, table)

    def test_an_error_description_holds_no_quotes_backslashes_or_other_alphabets(self) -> None:
        nobody = {"client_id": "test-suite", "username": 'Jos\u00e9"\\\n'}
        for got in (self.post("/oauth/register", {"redirect_uris": ['\u00e9"\\']}),
                    self.post("/oauth/debug/token", nobody),
                    self.at("/oauth/token", form={"grant_type": '"\\\u00e9'})):
            self.assertEqual(got.status, 400)
            self.assertRegex(got.json["error_description"], r"^[ !#-\[\]-~]+$")
        got = self.post("/oauth/register", {"redirect_uris": ["x"]})
        self.assertIn("got ['", got.json["error_description"])

    def test_another_scheme_gets_no_error_code_and_a_bad_token_does(self) -> None:
        plain, bearers = 'Bearer realm="s4s"', ("Bearer", "bearer x", "Bearer \xe9", "Bearer a, b", "bearer")
        for path in (f"/api/fhir/Patient/{DANIEL}", "/oauth/userinfo", "/api/me"):
            for header in ("", "Basic YTpi", "Basic " + "x" * 60_000, *bearers):  # RFC 6750 section 3.1
                with self.subTest(path=path, header=header[:12]):
                    got = self.at(path, headers={"Authorization": header} if header else {})
                    told = got.headers["www-authenticate"].split(", ")[:2]
                    expected = [plain, 'error="invalid_token"'] if header in bearers else [plain]
                    self.assertEqual((got.status, told), (401, expected))
        self.assertEqual(self.fhir(f"Patient/{DANIEL}").json["issue"][0]["code"], "login")


class Introspection(TokenTest):
    """POST /oauth/introspect (RFC 7662) and /oauth/revoke (RFC 7009)."""
    def setUp(self) -> None:
        super().setUp()
        self.given = self.app.tokens()

    def look(self, about: str, form: Any = (), **how: Any) -> Answer:
        return self.at("/oauth/introspect", form={"token": about, **dict(form)}, **how)

    def test_it_says_what_the_token_response_said(self) -> None:
        seen = introspected(self.app, self.given["access_token"])
        self.assertEqual([seen[name] for name in ("active", "scope", "patient", "client_id", "token_type")],
                         [True, self.given["scope"], DANIEL, self.app.client_id, "Bearer"])
        self.assertNotIn("sub", seen, "nobody asked for openid")
        got = self.look(self.given["refresh_token"], basic=(self.app.client_id, self.app.secret))
        self.assertEqual((got.json["active"], "token_type" in got.json), (True, False))
        self.assertNotIn(self.given["refresh_token"], got.text)

    def test_what_is_unknown_expired_revoked_or_ended_is_inactive_and_nothing_else(self) -> None:
        second, third = self.app.tokens(), self.app.tokens()
        self.revoke(second["access_token"])
        self.revoke(third["refresh_token"])
        for about in ("nothing", second["access_token"], third["access_token"], third["refresh_token"]):
            self.assertEqual(introspected(self.app, about), {"active": False})
        self.portal.advance(3601)
        self.assertEqual(introspected(self.app, self.given["access_token"]), {"active": False})

    def test_strangers_public_clients_names_and_bad_tokens_are_refused_and_told_what_it_takes(self) -> None:
        given, public = self.public.tokens(), self.public.client_id
        tries: list[Any] = [{}, {"basic": ("test-suite", "x")}, {"form": {"client_id": public}}]
        bad: list[Any] = ["nonsense", *(self.portal.issue_token(access_lifetime=life) for life in (0, None))]
        for how in (*tries, *({"token": token} for token in bad)):
            with self.subTest(how=how):
                got = self.look(given["access_token"], **how)
                self.is_error(got, "invalid_client", 401)
                told = 'Bearer realm="s4s", error="invalid_token"' if "token" in how else 'Basic realm="s4s"'
                self.assertTrue(got.headers["www-authenticate"].startswith(told))
        self.assertTrue(self.look(given["refresh_token"], token=given["access_token"]).json["active"])
        methods = self.at("/.well-known/oauth-authorization-server").json[
            "introspection_endpoint_auth_methods_supported"]
        self.assertEqual(("none" in methods, "Bearer" in methods), (False, True))

    def test_a_token_may_ask_about_its_own_authorization_alone(self) -> None:
        value, other = self.given["access_token"], self.app.tokens()
        for about, status in ((value, 200), (self.given["refresh_token"], 200), (other["access_token"], 401),
                              (other["refresh_token"], 401), ("nothing", 401)):
            self.assertEqual(self.look(about, token=value).status, status)

    def test_revoking_an_access_token_ends_it_alone_and_a_refresh_token_the_authorization(self) -> None:
        second = self.app.refresh(self.given["refresh_token"]).json
        self.revoke(second["access_token"])
        self.opens(second, False)
        for token in ("nothing", self.given["access_token"], second["refresh_token"]):
            self.revoke(token, App(self.portal))  # another client's: no error, and no effect
        self.opens(self.given)
        self.revoke(second["refresh_token"])
        self.opens(self.given, False)


# ######################################################################## 11 the record's boundary

def token_for(portal: s4s.Server, *labels: str, username: str = "daniel-adams", **scope: Any) -> str:
    """An access token for my record, of these categories alone."""
    return str(App(portal, **scope).tokens(username, patient_id=ME, security_labels=labels)["access_token"])


class FhirApi(RecordTest):
    """/api/fhir: one patient, and nothing else."""
    def test_where_the_registration_was_the_limit_the_403_says_so(self) -> None:
        condition, userinfo = self.portal.fhir_url + "/Condition/x", self.portal.url + "/oauth/userinfo"
        for registered, asked, url, limit in (
                ("patient/Patient.rs", "patient/Patient.rs patient/Condition.rs", condition, True),
                ("patient/*.rs", "patient/Patient.rs", condition, False),
                ("user/*.rs", "user/Patient.rs", condition, False),
                ("user/Patient.rs", "openid user/Patient.rs", userinfo, True),
                ("openid user/*.rs", "user/*.rs", userinfo, False)):
            with self.subTest(registered, asked=asked):
                got = ask(url, token=App(self.portal, registered).tokens(scope=asked)["access_token"])
                self.assertEqual(got.status, 403)
                self.assertIn("insufficient_scope", got.headers["www-authenticate"])
                words = f"registered for '{registered}': add it to the registration or to --fixtures"
                self.assertEqual(words in got.text, limit, got)

    def test_a_compartments_path_is_a_search_of_ones_own_and_so_is_a_form(self) -> None:
        self.assertEqual(self.ids(f"Patient/{DANIEL}/Condition?code=48167000"), ["smart-Condition-14"])
        form = {"patient": DANIEL, "code": "http://snomed.info/sct|48167000"}
        self.assertEqual(self.ids("Condition/_search", form=form), ["smart-Condition-14"])
        self.assert_statuses(self.token, {
            f"Patient/{DANIEL},{AMY}/Condition": 404, f"Patient/{DANIEL}/Condition?patient={AMY}": 403,
            "Patient//Condition": 404, f"Patient/Patient%2F{AMY}/Condition": 404})
        self.assert_statuses(self.issue("patient/Patient.rs"), {f"Patient/{DANIEL}/Condition": 403})

    def test_a_base_that_ends_in_a_slash_is_the_same_base(self) -> None:
        self.assert_statuses(self.token, {f"/Patient/{DANIEL}": 200, f"/Patient/{AMY}": 403, "/metadata": 200,
            "/Condition/_search": 404, "/.well-known/smart-configuration": 200, f"/Patient//{DANIEL}": 404})
        self.assert_statuses("", {f"/Patient/{DANIEL}": 401})
        self.assertEqual(ask(f"{self.portal.open_fhir_url}//Patient/{AMY}").status, 200)

    def test_open_access_that_is_off_shows_nothing(self) -> None:
        with s4s.Server(open_fhir=False) as closed:
            for path in ("Patient", f"Patient/{DANIEL}", "metadata"):
                self.assertEqual(ask(f"{closed.open_fhir_url}/{path}").status, 404, path)

    def test_a_parameter_of_a_scope_means_what_it_means_in_the_version_of_the_records(self) -> None:
        with s4s.Server(fhir_version="dstu2") as portal:
            token = portal.issue_token(scope="patient/MedicationOrder.rs?status=active")
            orders = within(ask(f"{portal.fhir_url}/MedicationOrder", token=token).json)
        self.assertEqual({order["status"] for order in orders}, {"active"})

    def test_me_tells_of_the_clients_tokens_for_one_record_but_not_their_values(self) -> None:
        self.at("/oauth/revoke", form={"token": self.issue(self.scope)}, basic=TEST_SUITE)
        for token, patient in ((self.token, ME), (self.issue(self.scope, patient_id=AMY), AMY)):
            got = self.at("/api/me", token=token)
            self.assertEqual(got.json["client_id"], "test-suite")
            self.assertEqual([told["patient"] for told in got.json["tokens"]], [patient])
            self.assertNotIn(token, got.text)


class WhatIsRemembered(unittest.TestCase):
    """Accesses and other answers about strangers' texts, which are remembered for all."""
    def test_a_user_without_records_gets_nothing_by_the_token_of_one_who_sees_all(self) -> None:
        self.assertEqual(len({s4s.EVERYBODY, s4s.ALL_PATIENTS, frozenset()}), 3)
        with s4s.Server(fixtures={"users": [{"username": "nobody", "password": "x"}]}) as portal:
            for username, seen in (("clinician", {JOSEPH}), ("nobody", set())):
                token = portal.issue_token(username=username, scope="user/*.rs")["access_token"]
                for path in (f"Patient?_id={JOSEPH}", f"Observation?patient={JOSEPH}&_count=1"):
                    got = ask(f"{portal.fhir_url}/{path}", token=token)
                    found = {JOSEPH for _ in got.json.get("entry", []) if got.status == 200}
                    self.assertEqual(found, seen, (username, path))

    def test_texts_of_strangers_take_a_bounded_memory_and_none_after_a_reset(self) -> None:
        def dates(number: int) -> None:
            ask(f"{portal.open_fhir_url}/Observation?date=2020-01-01T00:00:00.{number}{'1' * 50_000}")

        def scopes(number: int) -> None:
            scope = " ".join(f"patient/Observation.r?code={number}-{place}" for place in range(200))
            ask(f"{portal.fhir_url}/Patient", token=portal.issue_token(scope=scope)["access_token"])

        def queries(number: int) -> None:
            ask(f"{portal.open_fhir_url}/Observation?code={number},{','.join('abcdefgh' * 60)}")

        def hosts(number: int) -> None:
            ask(f"{portal.url}/health", headers={"Host": "x" * 9000 + f"{number}.localhost", "X": "y" * 9000})
        only_ours = tracemalloc.Filter(True, s4s.__file__)
        with s4s.Server() as portal, mock.patch.object(s4s, "MAX_MEMORY", 1_000_000):
            for attack, times in ((dates, 80), (scopes, 30), (queries, 25), (hosts, 300)):
                with self.subTest(attack=attack.__name__):
                    attack(0)
                    tracemalloc.start()
                    for number in range(times):
                        attack(number)
                        portal.portal.recorded.clear()
                    snapshot = tracemalloc.take_snapshot()
                    tracemalloc.stop()
                    ours, = snapshot.filter_traces([only_ours]).statistics("filename")
                    self.assertLess(ours.size, 3_000_000)
                    portal.reset()
                    self.assertEqual([memory for memory in s4s.MEMORIES if len(memory) > 2], [])

    def test_of_a_request_no_more_is_kept_than_a_test_may_see(self) -> None:
        long, form = "x" * 1_000_000, {"Content-Type": "application/x-www-form-urlencoded"}
        ours, times = tracemalloc.Filter(True, s4s.__file__), 20
        with s4s.Server() as portal:
            token, search = portal.issue_token()["access_token"], "/api/fhir/Observation/_search"
            many = b"&".join([b"_id=" + b"x" * 900] * 999)
            for name, path, how, status in (
                    ("an error of its length", "/oauth/token", {"form": {"grant_type": long}}, 400),
                    ("a value", search, {"form": {"_lastUpdated": long}, "token": token}, 400),
                    ("many values", search, {"body": many, "headers": form, "token": token}, 400),
                    ("a broken body", "/oauth/token", {"body": b"x" * (2 << 20), "headers": form}, 413),
                    ("many headers", "/health", {"headers": {f"x{i}": "" for i in range(6000)}}, 431)):
                with self.subTest(name):
                    tracemalloc.start()
                    portal.portal.recorded.clear()
                    for _ in range(times):
                        with contextlib.suppress(OSError):  # a body too large is not read to its end
                            self.assertEqual(ask(portal.url + path, **cast(Any, how)).status, status)
                    gc.collect()
                    snapshot = tracemalloc.take_snapshot()
                    tracemalloc.stop()
                    self.assertEqual(len(portal.portal.recorded), times)
                    kept = sum(found.size for found in snapshot.filter_traces([ours]).statistics("filename"))
                    self.assertLess(kept, times * (s4s.MAX_RECORDED_BODY + 30_000) + 1_000_000)
                    told = ask(portal.url + path, **cast(Any, how)).text if status == 400 else ""
                    self.assertLess(len(told), 3000)
            request = s4s.Request("POST", "/oauth/token", {"host": "localhost"}, long.encode())
            lives = weakref.ref(request)
            s4s.dispatch(portal.portal, request)
            del request
            self.assertIsNone(lives(), "nor until the next garbage collection")


class WhoseItIs(unittest.TestCase):
    """owner() and Access, resource by resource."""
    def test_each_type_and_version_of_fhir_has_its_element(self) -> None:
        base, somebody = "https://p.example/api/fhir", {"type": "Patient", "identifier": {"value": "1"}}
        me, other, doctor, local, away, fake, inner, relative = (to(text) for text in (
            f"Patient/{ME}", f"Patient/{OTHER}", f"{base}/PractitionerRole/1", f"{base}/Patient/{ME}",
            f"https://elsewhere.example/Patient/{ME}", f"{base}XPatient/{ME}", "#p", "RelatedPerson/1"))
        theirs = observation("x", OTHER)
        no_types: list[Any] = [["Patient"], {}, None, 7, True, ""]
        cases: list[tuple[Any, Any, str]] = [
            ("Account", {"subject": [me]}, ME), ("Patient", {"id": ME}, ME),
            ("Appointment", {"participant": [{"actor": doctor}, {"actor": me}]}, ME),
            *(("Appointment", {"participant": [{"actor": me}], "patient": who}, whose)
              for who, whose in ((me, ME), (other, s4s.UNKNOWN), ({"actor": me}, s4s.UNKNOWN))),
            # Of absolute references, those below our own base.
            ("Goal", {"subject": local}, ME),
            ("Goal", {"subject": away}, s4s.UNKNOWN), ("Goal", {"subject": fake}, s4s.UNKNOWN),
            # Several patients are nobody's answer.
            ("Condition", {"subject": me, "patient": other}, s4s.UNKNOWN),
            ("Account", {"subject": [me, other]}, s4s.UNKNOWN),
            *(("Appointment", {"participant": [{"actor": me}, {"actor": doctor}, person]}, s4s.UNKNOWN)
              for person in ("Amy", {}, {"actor": None}, *({"actor": actor} for actor in (
                  other, somebody, {"display": "Amy"}, away, inner, relative)))),
            ("Practitioner", {"contained": [theirs]}, s4s.UNKNOWN),
            *(("Goal", {"subject": me, "contained": [made("Schedule", actor=[actor])]}, whose)
              for actor, whose in ((local, ME), (away, s4s.UNKNOWN))),
            ("Basic", {"subject": me, "contained": [observation("y", contained=[theirs])]}, s4s.UNKNOWN),
            # So is an element that is believed wherever it stands, FHIR's or not.
            *((name, {element: who}, whose) for name in ("Device", *s4s.SHARED_TYPES) for who, whose in (
                (me, ME), (other, OTHER), (away, s4s.UNKNOWN)) for element in s4s.OWNER_NAMES),
            *((name, {"id": ME, "subject": me, "beneficiary": me, "target": me, element: other}, s4s.UNKNOWN)
              for name in s4s.OWNER_ELEMENTS for element in ("patient", "for", "individual")),
            *(("Goal", {"subject": me, "contained": [made("Encounter", subject=me, patient=who)]}, whose)
              for who, whose in ((me, ME), (other, s4s.UNKNOWN))),
            # A Patient without an id is not nobody's, a Device without a patient is.
            *(("Patient", {"id": key}, s4s.UNKNOWN) for key in (s4s.NOBODY, "..", "a b", None, 7)),
            ("Device", {}, s4s.NOBODY), ("Device", {"patient": {"display": "somebody"}}, s4s.UNKNOWN),
            *((name, {"id": ME, "subject": me}, s4s.UNKNOWN) for name in no_types)]
        for name, more, expected in cases:
            with self.subTest((name, more)):
                self.assertEqual(s4s.owner({"resourceType": name, **more}, base), expected)

    def test_each_type_is_opened_by_its_category_and_by_no_other(self) -> None:
        rows = """patient: Patient | allergies: AllergyIntolerance | immunizations: Immunization
            | medications: MedicationOrder MedicationRequest MedicationStatement MedicationDispense
            MedicationAdministration | problems: Condition | procedures: Procedure | coverage: Coverage
            | documents: DocumentReference Binary | explanation-of-benefit: ExplanationOfBenefit
            | imaging: ImagingStudy | encounters: Encounter | other: Goal CarePlan Device Task Observation"""
        for label, types in (row.strip().split(": ") for row in rows.split("|")):
            for type_name, open_to in itertools.product(types.split(), (*s4s.CATEGORIES, "")):
                of_mine = dict.fromkeys(s4s.OWNER_ELEMENTS[type_name][:1], to(f"Patient/{ME}"))
                resource = made(f"{type_name}/{ME}", **of_mine)
                access = s4s.Access("patient/*.rs", ME, labels=frozenset(filter(None, [open_to])))
                self.assertEqual(access.may_see(s4s.Resource(resource), "r"), open_to in ("", label),
                                 (type_name, open_to))

    def test_what_scopes_and_categories_open(self) -> None:
        narrowed, vital = "patient/Observation.rs?status=final,amended", frozenset(["vital-signs"])
        theirs = observation("theirs", OTHER)
        one, two = ([{"coding": [{"code": code}]} for code in codes.split()]
                    for codes in ("vital-signs", "vital-signs laboratory"))
        cases: Any = ((narrowed, s4s.NO_LIMIT, "r", observation("x"), observation("x", status="preliminary")),
                ("patient/*.rs", vital, "s", observation("x", category=one), observation("x", category=two)),
                ("patient/*.r", frozenset(["other"]), "r", {**observation("x"), "category": one,
                    "resourceType": "DiagnosticReport"}, observation("x", category=one)),
                ("patient/Binary.r", s4s.NO_LIMIT, "r", file := made("Binary"), made("DocumentReference")),
                ("patient/Binary.s system/Condition.r", s4s.NO_LIMIT, "r", made("Condition"), file),
                ("system/Observation.r", s4s.NO_LIMIT, "r", theirs, made(f"Patient/{OTHER}")),
                ("system/AuditEvent.s system/Observation.r", s4s.NO_LIMIT, "s", made("AuditEvent"), theirs),
                ("system/Patient.rs", s4s.NO_LIMIT, "r", made(f"Patient/{OTHER}"), made("AuditEvent")))
        for scope, labels, letter, seen, hidden in cases:
            with self.subTest(scope):
                access = s4s.Access(scope, ME, labels=labels)
                with mock.patch.object(s4s.Resource, "is_pointed_to", return_value=True):
                    got = [access.may_see(s4s.Resource(resource), letter) for resource in (seen, hidden)]
                self.assertEqual(got, [True, False])
                self.assertIs(access.narrowed, bool(labels) or "?" in scope)


HIDDEN = "bm90Zm9yeW91"  # stands in all that is another patient's, and never comes out: as it is, or decoded


class OnePatientAndNothingElse(RecordTest):
    """Attacks on the record's boundary, each of which a careless server lets through: on the records kept
    here, and by the class below on another server's."""
    def setUp(self) -> None:
        super().setUp()
        code, other = {"text": HIDDEN}, to(f"Patient/{OTHER}")
        theirs = observation("theirs", OTHER, code=code)
        their_doc = document("their-doc", OTHER, "Binary/their-file")
        binary = made("Binary", contentType="text/plain", data=HIDDEN)
        self.put(made(f"Patient/{OTHER}", name=[{"text": HIDDEN}]), theirs,
                 {**theirs, "id": "more"}, observation("mine"), observation("draft", status="preliminary"),
                 observation("performed", performer=[other]), observation("containing", contained=[theirs]),
                 observation("nesting", extension=[{"valueX": theirs}]),  # where FHIR has no resource
                 observation("group", subject=to("Group/1"), code=code),
                 made("Practitioner/dr"), {**their_doc, "description": HIDDEN},
                 document("my-doc", ME, "Binary/my-file"), {**binary, "id": "my-file", "data": "aGk="},
                 *({**binary, "id": name} for name in ("their-file", "orphan")),
                 {**binary, "id": "their-own", "securityContext": other})

    def put(self, *resources: dict[str, Any]) -> None:
        self.portal.load(bundle_of(*resources))

    def asked_behind(self) -> int:
        """How many requests the portal made for those it was sent."""
        return len(self.behind.seen) if isinstance(self, ForwardingTest) else 0

    def narrow_token(self, kind: str = "") -> str:
        """A new token for my record, of less than all of it: by a category, or by a parameter."""
        if kind == "category":
            return token_for(self.portal, "problems")
        return self.issue("patient/Observation.rs?status=final" if kind else self.scope)

    def told(self, path: str, name: str, token: str = "", **how: Any) -> tuple[Any, ...]:
        """All that an app can tell of an answer, with what it cost, but for a name in what it asked for."""
        token, before = token or self.token, self.asked_behind()
        got = self.get(path, token=token, **how)
        headers = {**got.headers, "date": "", "content-length": ""}
        return got.status, got.text.replace(name, "it"), headers, self.asked_behind() - before

    def assert_kept_out(self, path: str, status: int = 403, **how: Any) -> None:
        """An attack is refused, or finds nothing (the records kept here know more parameters than are
        forwarded, and pin the search to the patient)."""
        got = self.get(path, **how)
        self.assertIn(got.status, (200, 400, 401, 403, 404, 405), got)
        self.assertNotRegex(got.text, f"{HIDDEN}|notforyou")

    def test_what_is_not_in_the_record_is_answered_as_if_it_were_not_there(self) -> None:
        hows: list[Any] = [{}, {"method": "HEAD"}, *({"headers": {name: value}} for name, value in {
            "If-None-Match": '*, W/"1", W/"7"', "If-Modified-Since": "Fri, 31 Dec 2100 00:00:00 GMT",
            "Accept": "text/plain, */*"}.items())]
        for how in hows:
            for kind, *paths in (
                    ("", "Observation/theirs", "DocumentReference/their-doc", "Observation/theirs/_history/1",
                     "Observation/absent/_history/1", "Observation/containing", "Observation/nesting",
                     "Observation/group", "Observation/deleted", "Binary/deleted", "Binary/their-file",
                     "Binary/orphan", "Binary/their-own"),
                    ("category", "Observation/mine", f"Patient/{ME}", "Binary/my-file"),
                    ("parameter", "Observation/draft")):
                for path in paths:
                    with self.subTest(kind, path=path, how=how):
                        absent = f"{'Binary' if path[0] == 'B' else 'Observation'}/absent"
                        answers = [self.told(asked, "/".join(asked.split("/")[:2]), self.narrow_token(kind),
                                             **how) for asked in (absent, path)]
                        self.assertEqual(answers[0], answers[1])
                        self.assertEqual((answers[0][0], HIDDEN in answers[0][1]), (404, False))

    def test_what_an_app_has_already_is_not_sent_again(self) -> None:
        got = self.get("Observation/mine", headers={"If-None-Match": '"1"'})
        self.assertEqual((got.status, got.headers["etag"][:3], got.headers["cache-control"], got.body),
                         (304, 'W/"', "no-store", b""))
        got, head = (self.get("Observation/mine", method=method) for method in ("GET", "HEAD"))
        got.headers["date"] = head.headers["date"]
        self.assertEqual((head.status, head.headers, head.body), (200, got.headers, b""))

    def test_another_patient_is_refused_by_the_id_alone(self) -> None:
        for path, form in (
                *((path, "") for path in (
                    "Patient/{}", "Patient/{}/_history/1", "Patient/{}/Observation", "Patient/{}/$everything",
                    "Patient?_id={}", "Observation?patient={}", f"Observation?patient={ME},{{}}",
                    "Observation?subject=Patient/{}", f"Observation?patient={ME}&patient={{}}",
                    "Observation?subject:Patient={}", "Observation?p%61tient={}")),
                ("Observation/_search", "patient"), (f"Observation/_search?patient={ME}", "patient")):
            for how in ({}, {"method": "HEAD"}, {"headers": {"If-None-Match": "*"}}):
                with self.subTest(path, how=how):
                    answers = [self.told(path.format(name), name, **({"form": {form: name}} if form else how))
                               for name in (OTHER, "nobody")]
                    self.assertEqual(answers[0], answers[1])
                    self.assertEqual((answers[0][0], answers[0][-1]), (403, 0))

    def test_what_looks_into_another_record_or_hides_something_in_a_path_is_kept_out(self) -> None:
        for attack, status, *paths in (
                ("another name of the parameter, another reference", 403, f"Observation?Patient={OTHER}",
                 f"Observation?performer=Patient/{OTHER}", f"Observation?performer:Patient={OTHER}",
                 f"Observation?subject=https://elsewhere.example/fhir/Patient/{ME}"),
                ("a modifier that can't be judged, turns it round, takes it away", 403,
                 "Observation?patient:identifier=http://ids.example%7C1", f"Observation?patient:not={ME}",
                 "Observation?subject:missing=true"),
                ("a chain, to the owner, and back", 403, "Observation?performer.name=Smith",
                 "Observation?_sort=code,-derived-from.value-quantity", "Observation?_sort:desc=subject.name",
                 "Observation?performer:Practitioner.name=Smith", f"Observation?subject:Patient._id={OTHER}",
                 f"Practitioner?_has:Observation:performer:patient={OTHER}"),
                ("a language, a query, types, the server's own paging", 403, "Observation?_query=everybody",
                 f"Observation?_filter=patient%20eq%20{OTHER}", "?_type=Patient,Observation",
                 "Observation?_type=Patient", "Observation?_getpages=0d33d1e1"),
                ("another operation", 403, "$export", "Patient/$export", "Patient/$match",
                 f"Patient/{ME}/$summary", "Observation/$lastn", "Observation/mine/%24meta",
                 f"Observation/{ME}/$everything"),
                ("a type nobody can place", 403, "Binary", *(name + rest for rest in ("", "/1") for name in (
                    "AuditEvent", "Group", "Bundle", "Person", "Unheard"))),
                ("a path", 404, "Observation/..", "Observation/../Patient", "Observation/%2e%2e/Patient",
                 "Observation/.", "Observation/%2E%2E%2FPatient", "Observation/%252e%252e/Patient",
                 "//Observation/theirs", "Observation;a=b", "Observation/theirs%2f_history", "metadata/..",
                 "Observation/theirs%3fa=b", "Observation/theirs;a=b", "Observation%5ctheirs",
                 "Observation\\theirs", "observation/theirs", "Observation/theirs%00",
                 "Observation/theirs%0d%0aX:y", "Observation/theirs/_history/..", "Observation/theirs/x",
                 "Observation/_search", "Observation%2Fmine", f"Patient/{ME}/Observation/theirs",
                 "http://127.0.0.1/fhir/Observation/theirs")):
            for path in paths:
                with self.subTest(attack, path=path):
                    self.assert_kept_out(str(path), cast(int, status))

    def test_writing_and_batches_are_refused_by_name_before_the_body_is_judged(self) -> None:
        writer = self.issue("patient/*.cruds")
        for method, path in (("POST", ""), ("POST", "Observation"), ("POST", "Observation/mine/_search"),
                ("GET", "$export"), ("POST", f"Patient/{ME}/$summary"), ("PUT", "Observation?_id=mine"),
                ("DELETE", f"Patient/{ME}/$everything"), ("PUT", f"Patient/{ME}/Observation"),
                *((method, "Observation/mine") for method in ("POST", "PUT", "PATCH", "DELETE"))):
            is_write = (method, path) in (("POST", "Observation"), ("PUT", "Observation/mine"))
            for token, status in ((self.token, 403), ("", 401), *(() if is_write else ((writer, 403),))):
                with self.subTest(method, path=path):
                    before = self.asked_behind()
                    got = self.assert_refused(path, status, method=method, body=b"{", token=token)
                    self.assertEqual(self.asked_behind(), before)
                    if token == writer:
                        told = f"{method} /api/fhir/{path.partition('?')[0]}".rstrip("/")
                        self.assertIn(f"{told}: possible", got.json["issue"][0]["diagnostics"])

    def test_open_access_reads_everybodys_and_writes_nothing(self) -> None:
        found = self.ids("Observation?_count=1000", **OPENLY)
        self.assertEqual(self.read("Observation?_count=1000", **OPENLY)["total"], len(found))
        self.assertLessEqual({"mine", "theirs", "group"}, set(found))
        self.assertEqual(self.read("Observation/theirs", **OPENLY)["id"], "theirs")
        before = self.asked_behind()
        for method, path in (("POST", ""), ("POST", "Patient"), ("POST", "metadata"), *(
                (method, "Observation/mine") for method in ("PUT", "PATCH", "DELETE"))):
            with self.subTest(method, path=path):
                self.assert_refused(path, 405, method=method, body=b"{}", **OPENLY)
        self.assertEqual(self.asked_behind(), before)

    def stored(self) -> Any:
        records = self.portal.portal.records
        assert isinstance(records, s4s.EmbeddedRecords)
        return [tuple(row) for name in ("resources", "search_values")
                for row in records.store.rows(f"SELECT * FROM {name} ORDER BY number")]

    def assert_not_written(self, why: str, status: int, path: str, *resources: Any, **how: str) -> None:
        """Writes (of an Observation, if nothing else is given) are refused in words that hold nothing of
        another's, and nothing has changed."""
        for resource in resources or [observation(path.partition("/")[2])]:
            with self.subTest(why, path=path, resource=resource):
                before, got = self.stored(), self.write(path or resource["resourceType"], resource, **how)
                self.assertEqual((got.status, got.json["resourceType"]), (status, "OperationOutcome"), got)
                self.assertNotIn(HIDDEN, got.text)
                self.assertEqual(self.stored(), before)

    def test_what_is_created_is_mine_whole_and_in_full(self) -> None:
        mine, other, person = observation("x"), to(f"Patient/{OTHER}"), made(f"Patient/{OTHER}")
        device, file = made("Device"), made("Binary", contentType="text/plain")
        self.put(made("Provenance/p", target=[to("Observation/mine")]))
        misread: list[Any] = [
            {"Subject": other}, {"\u017fubject": other}, {"subject ": other}, {"sUBJECT": other}, {"ID": "x"},
            {"Category": []}, {"note": [{"text": "x", "Text": "y"}]},
            {"content": [{"attachment": {"uRL": ""}}]}]
        cases: Any = (
            ("another's", 403, "", observation("x", OTHER), device | {"patient": other},
             file | {"securityContext": other}),
            ("nobody's", 403, "", device, file, made("Practitioner"), made("Observation"),
             made("Practitioner", subject=mine["subject"])),
            ("whose nobody can tell", 403, "", *(mine | {"subject": subject} for subject in (
                {"identifier": {"value": ME}}, [], [to(f"Patient/{ME}"), other], *map(to, (
                    "Group/1", "#p", f"https://elsewhere.example/fhir/Patient/{ME}", f"Patient?_id={ME}",
                    f"urn:uuid:{ME}"))))),
            ("another's in it", 403, "", mine | {"contained": [observation("y", OTHER)]},
             mine | {"contained": [person]}, mine | {"extension": [{"valueReference": person}]}),
            ("of what is another's", 403, "", *(made("Provenance", target=[*map(to, names.split())])
                                                for names in (
                "Observation/theirs", "Observation/mine Observation/theirs", "Practitioner/dr",
                "Observation/absent", f"Observation/mine Patient/{OTHER}", "Provenance/p",
                "Observation/mine Provenance/p"))),
            ("of itself", 403, "Provenance/p", made("Provenance/p", target=[to("Provenance/p")])),
            ("a new person", 403, "", person, made(f"Patient/{ME}")),
            ("a part of one, no meta", 400, "", mine | {"meta": {"tag": [{"code": "SUBSETTED"}]}},
             mine | {"meta": "1"}), ("another type than the address, none", 400, "Condition", mine, {}),
            ("no object", 400, "Observation", [mine]),
            ("of another version", 400, "", *(made(name, patient=mine["subject"])
                                              for name in f"{MOVED} ImagingStudy MeasureReport".split())),
            ("what others might read otherwise", 400, "Observation", *(mine | more for more in misread)))
        for case in cases:
            self.assert_not_written(*case)
        clinician = self.issue("user/*.crus", username="clinician")
        self.assert_not_written("who may open both", 403, "Patient", person, token=clinician)
        self.assert_not_written("absent", 403, "Observation", observation("x", "absent"), token=clinician)
        self.assert_not_written("a type not served", 403 if self.asked_behind() else 404, "Unheard", mine)
        for status, header, value in ((406, "Accept", "text/html"), (415, "Content-Type", "text/plain")):
            self.assert_not_written(header, status, "Observation", **{header: value})

    def test_what_is_updated_is_mine_before_and_after(self) -> None:
        mine, clinician = observation("mine"), self.issue("user/*.crus", username="clinician")
        cases: Any = (
            *(("not to be seen", 404, f"Observation/{name}") for name in (
                "theirs", "absent", "deleted", "containing", "nesting", "group")),
            ("another's file", 404, "Binary/their-file", made("Binary/their-file")),
            ("a file that says not whose", 403, "Binary/my-file",
             made("Binary/my-file", securityContext=mine["subject"])),
            ("nobody's", 403, "Practitioner/dr", made("Practitioner/dr")),
            ("moved to another, taken from everybody, another's put in", 403, "Observation/mine",
             observation("mine", OTHER), mine | {"subject": None},
             mine | {"contained": [observation("y", OTHER)]}),
            ("another person", 403, f"Patient/{OTHER}", person := made(f"Patient/{OTHER}")),
            ("another person's id", 400, f"Patient/{ME}", person),
            ("another id than the address, none, another type", 400, "Observation/mine",
             observation("theirs"), made("Observation"), mine | made("Condition")))
        for case in cases:
            self.assert_not_written(*case)
        for path, resource in (("Observation/mine", observation("mine", OTHER)),
                               ("Observation/theirs", observation("theirs"))):
            self.assert_not_written("moved by who may open both", 403, path, resource, token=clinician)
        extras: list[Any] = [{}, {"extension": [{"valueUrl": "Binary/none"}]}]
        for extra in extras:
            absent, theirs = (self.told(f"Observation/{name}", name, self.issue("patient/*.crus"),
                method="PUT", data=observation(name, **extra), headers={"If-Match": '"nope"'})
                for name in ("absent", "theirs"))
            self.assertEqual(absent, theirs)
        self.assert_not_written("another version", 412, "Observation/mine", **{"If-Match": 'W/"nope", "no"'})
        for condition in ("If-None-Exist", "If-None-Match", "If-Unmodified-Since"):
            for path in ("Observation", "Observation/mine"):
                self.assert_not_written(condition, 400, path, **{condition: "*"})

    def test_the_scopes_letters_categories_and_parameters_hold_for_writing(self) -> None:
        mine, goal = observation("mine"), made("Goal", subject=to(f"Patient/{ME}"))
        lab, draft = {"category": [{"coding": [{"code": "laboratory"}]}]}, mine | {"status": "draft"}
        narrow = token_for(self.portal, "laboratory", scope="launch/patient patient/*.cruds")
        final = self.issue("patient/Observation.crus?status=final")
        only = {letter: self.issue(f"patient/Observation.{letter}") for letter in ("rs", "c", "u")}
        reading, writing = (self.issue(f"patient/Observation.rs{one} patient/Observation.u{other}")
                            for one, other in (("?status=final", ""), ("", "?status=final")))
        cases: Any = ((only["rs"], ("no letter", 403, "Observation"), ("no letter", 403, "Observation/mine")),
            (only["u"], ("no letter", 403, "Observation"), ("not even read", 404, "Observation/theirs")),
            (only["c"], ("no letter", 403, "Observation/mine"), ("another type", 403, "Goal", goal)),
            (narrow, ("a category left out", 403, "Observation"), ("nor", 403, "Goal", goal),
             ("nor", 404, "Observation/mine", mine | lab),
             ("nor", 404, f"Patient/{ME}", made(f"Patient/{ME}"))),
            (final, ("outside of ?param=", 403, "Observation", draft),
             ("led out of it", 403, "Observation/mine", draft), ("led into it", 404, "Observation/draft")),
            (reading, ("unseen", 404, "Observation/draft")),
            (writing, ("seen, and outside", 403, "Observation/draft")))
        for token, *refused in cases:
            for case in refused:
                self.assert_not_written(*case, token=token)
        got = self.write("Goal", goal, only["c"])
        self.assertIn('scope="patient/Goal.c"', got.headers["www-authenticate"])
        self.assertEqual(got.headers["cache-control"], "no-store")
        for path, resource, token in (("Observation", mine, only["c"]), ("Observation", mine | lab, narrow),
                ("Observation/mine", mine, only["u"]), ("Observation/mine", mine, final)):
            with self.subTest(path, token=token):
                self.assertIn(self.write(path, resource, token).status, (200, 201))

    def test_what_a_provenance_may_be_about_tells_nothing_of_what_is_hidden(self) -> None:
        by_category = token_for(self.portal, "other", scope="launch/patient patient/*.crus")
        by_parameter = self.issue("patient/Observation.rs?status=final patient/Provenance.crus")
        self.put(observation("lab", category=[{"coding": [{"code": "laboratory"}]}]))
        for token, hidden in ((by_category, "lab"), (by_parameter, "draft"),
                              (self.issue("patient/Provenance.crus"), "mine")):
            for seen, path in itertools.product((["Observation/mine"], []), ("Provenance", "Provenance/p")):
                answers = []
                for name in ("absent", "theirs", hidden):
                    self.put(made("Provenance/p", target=[to("Observation/mine")]))
                    sent = made(path, target=[*map(to, (*seen, f"Observation/{name}"))])
                    answers.append(self.told(path, name, token, data=sent,
                                             method="PUT" if "/" in path else "POST"))
                with self.subTest(hidden, path=path, seen=seen):
                    self.assertEqual((answers[0][0], answers[1:]), (403, 2 * answers[:1]))
            got = self.write("Provenance", made("Provenance", target=[to("Observation/mine")]), token)
            self.assertEqual(got.status, 403 if hidden == "mine" else 201, got)

    def test_what_is_written_points_only_to_files_that_are_open_already(self) -> None:
        def places(url: str) -> dict[str, dict[str, Any]]:
            doc = document("my-doc", ME, "Binary/my-file")
            doc["content"].append({"attachment": {"url": [url]}})
            report = observation("x", presentedForm=[{"url": url}]) | made("DiagnosticReport")
            return {"DocumentReference": document("my-doc", ME, url), "DocumentReference/my-doc": doc,
                    "DiagnosticReport": report,
                    "Observation": observation("x", contained=[document("y", ME, url)]),
                    "Observation/mine": observation("mine", extension=[{"valueUrl": url}])}
        base, behind = self.portal.fhir_url, self.behind.url if isinstance(self, ForwardingTest) else ".."
        self.put(made("Binary/None", contentType="text/plain", securityContext=to(f"Patient/{ME}")))
        for spelling in ("Binary/{}", "Binary/{}/_history/1", "./Binary/{}", "../fhir/Binary/{}",
                "//x/Binary/{}", "/api/fhir/Binary/{}", "Binary%2F{}", "%42inary/{}", "%2542inary/{}",
                " Binary/{}\n", "Bin\tary/{}", "Binary\\{}", "Binary?_id={}", "binary/{}",
                base + "/Binary/{}", behind + "/Binary/{}", behind + "/./Binary/{}#x"):
            for binary_id in ("their-file", "absent"):
                for path, resource in places(spelling.format(binary_id)).items():
                    self.assert_not_written(spelling, 403, path, resource)
        for url in ("Binary/their-file?x=1 2", " Binary/their-file x", "a b/../Binary/their-file",
                    "Binary /their-file", "Binary%20/their-file"):
            for path in ("DocumentReference", "DocumentReference/my-doc", "DiagnosticReport"):
                self.assert_not_written(url, 403, path, places(url)[path])
            noted = observation("x", note=[{"text": f"See {url}"}], code={"text": "at Binary/x, y"})
            self.assertEqual(self.write("Observation", noted).status, 201, "it is prose")
        for path, resource in places("https://elsewhere.example/fhir/Binary/their-file").items():
            self.assertIn(self.write(path, resource).status, (403,) if self.asked_behind() else (200, 201))
        self.put(made("Binary/their-file", contentType="text/plain", data="aGk="))
        self.assert_refused("Binary/their-file", 404, token=self.narrow_token())
        for url in ("Binary/my-file", "Binary/my-file/_history/1", f"{base}/Binary/my-file", "https://x.example"):
            for path, resource in places(url).items():
                with self.subTest(url, path=path):
                    self.assertIn(self.write(path, resource).status, (200, 201))
                    self.assertEqual(self.get("Binary/my-file").status, 200)
        self.assert_not_written("without patient/Binary.r", 403, "", document("x", ME, "Binary/my-file"),
                                token=self.issue("patient/DocumentReference.crus"))
        before, many = self.asked_behind(), [{"attachment": {"url": f"Binary/{n}"}} for n in range(1000)]
        self.assert_not_written("too many", 403, "", document("x", ME, "") | {"content": many})
        self.assertEqual(self.asked_behind(), before)

    def test_what_an_app_writes_it_reads_finds_and_changes(self) -> None:
        base, sent = self.portal.fhir_url, observation("theirs", note=[{"text": "new"}])
        sent["subject"]["reference"] = f"{base}/Patient/{ME}"
        got = self.write("Observation", sent)
        self.assertEqual(got.status, 201, got)
        new = got.json
        path = f"Observation/{new['id']}"
        self.assertNotIn(new["id"], ("theirs", ""))
        self.assertEqual((new["note"], got.headers["location"].partition("/_history/")[0]),
                         (sent["note"], f"{base}/{path}"))
        self.assertRegex(got.headers["etag"], 'W/"[0-9]+"')
        self.assertIn("last-modified", got.headers)
        self.assertEqual(self.read(path)["note"], sent["note"])
        self.assertIn(new["id"], self.ids("Observation?_count=1000"))
        for number, match in enumerate(("W/{}", "{}", "*", '"nope", W/{}', "")):
            with self.subTest(match):
                tag = self.get(path).headers["etag"].replace("W/", "")
                got = self.write(path, new | {"status": f"x{number}"}, **{"If-Match": match.format(tag)})
                self.assertEqual(got.status, 200, got)
                self.assertEqual([got.json["status"], self.read(path)["status"]], 2 * [f"x{number}"])
        for written, status in ((path, 200), ("Observation", 201)):
            got = self.write(written, new, Prefer="handling=strict; return=minimal")
            self.assertEqual((got.status, got.body, "location" in got.headers), (status, b"", True))
        self.assertIn(b"status", self.get(path, headers={"Prefer": "return=minimal"}).body)
        file = self.write("Binary", made("Binary", contentType="text/plain", data="aGk=",
                                         securityContext=to(f"Patient/{ME}"))).json["id"]
        doc = self.write("DocumentReference", document("x", ME, f"Binary/{file}")).json
        self.assertEqual(doc["content"][0]["attachment"]["url"].rpartition("/")[2], file)
        self.assertEqual(self.write("Provenance", made("Provenance", target=[
            to(f"DocumentReference/{doc['id']}")])).status, 201)
        self.assertEqual(self.write(f"Patient/{ME}", made(f"Patient/{ME}")).status, 200)

    def test_a_search_shows_mine_and_nobodys(self) -> None:
        form, every = {"_count": "1000"}, "Observation?_count=1000"
        for attack, path, how in (
                ("everybody's", every, {}), ("posted", "Observation/_search", {"form": form}),
                ("my compartment", f"Patient/{ME}/Observation?_count=1000", {}),
                *(("by _include", f"{every}&_include=Observation:{name}", {}) for name in ("performer", "*")),
                ("everything", f"Patient/{ME}/$everything", {})):
            with self.subTest(attack):
                ids = set(self.ids(path, **how))
                self.assertEqual(ids & {"mine", "draft", "theirs", "group"}, {"mine", "draft"})
                self.assertNotIn(HIDDEN, self.get(path, **how).text)  # type: ignore[arg-type]
        for path in ("Patient", "Practitioner?_revinclude=Observation:performer",
                     "Practitioner?_revinclude=Observation:*"):
            self.assertNotIn(HIDDEN, self.get(path).text)

    def test_answers_are_cut_after_the_judgement_and_say_so(self) -> None:
        everything = f"Patient/{ME}/$everything"
        self.put(observation("mine", text={"div": "x"}, valueInteger=1, _status={}, modifierExtension=[],
                             code={"text": "\0---\0"}))
        kept = {"resourceType", "id", "meta", "status", "_status", "modifierExtension"}
        data = {*kept, "subject", "code", "valueInteger"}
        for query, shown, is_used in (("_elements=code", {*kept, "code"}, True),
                ("_summary=data", data, True), ("_elements=value,cod", {*kept, "valueInteger"}, True),
                ("_elements=code&_elements=text", {*kept, "code", "text"}, True),
                ("_elements=text,code&_summary=data", {*kept, "code"}, True),
                *((f"_summary={word}", {*data, "text"}, is_used) for word, is_used in (
                    ("false", True), ("true", False), ("text", False)))):
            pairs = parse_qsl(query)
            parameters = [{"name": name, "valueString": value} for name, value in pairs]
            for path, how in ((f"Observation/mine?{query}", {}), (f"Observation?_count=1000&{query}", {}),
                    (f"{everything}?{query}", {}), ("Observation/_search?_count=1000", {"form": pairs}),
                    (everything, {"data": made("Parameters", parameter=parameters)})):
                with self.subTest(path, query=query):
                    answer = self.read(path, **cast(Any, how))
                    [mine] = [entry["resource"] for entry in answer.get("entry", [{"resource": answer}])
                              if entry["resource"]["id"] == "mine"]
                    self.assertEqual(set(mine) | {"meta"}, shown)
                    tags = [tag["code"] for tag in mine.get("meta", {}).get("tag", [])]
                    self.assertEqual(tags, [] if "text" in shown and "subject" in shown else ["SUBSETTED"])
                    if "link" in answer:
                        self.assertEqual(query in unquote_plus(answer["link"][0]["url"]), is_used)
        for path in (everything, "Observation/mine"):  # where nothing is counted
            self.assertEqual(self.read(f"{path}?_summary=count"), self.read(path))
        ids = self.ids("Observation?_count=1000&_elements=code", token=self.narrow_token("parameter"))
        self.assertEqual({"mine", "draft"} & set(ids), {"mine"}, "judged by what is not shown")
        for path in ("Observation", "Observation/mine", everything):
            self.assert_kept_out(f"{path}?_summary=all", 400)

    def test_everything_is_the_same_posted_with_its_parameters(self) -> None:
        path, good = f"Patient/{ME}/$everything", made("Parameters")
        for pairs in ((), (("_type", "Observation"), ("_type", "Patient"), ("start", "2000"), ("_count", 2))):
            body = {**good, "parameter": [{"name": name, "valueX": value} for name, value in pairs]}
            expected = self.read(f"{path}?{urlencode(pairs)}")
            self.assertIn("entry", expected)
            self.assertEqual(self.read(path, data=body), expected)
        self.assertEqual(self.ids(path, method="POST"), self.ids(path))
        for parameter in (7, [{"name": "start"}], [{"name": 7, "valueDate": "2020"}], [{"valueDate": "2020"}],
                          [{"name": "start", "valueDate": "2020", "valueCode": "2021"}],
                          [{"name": "start", "valuePeriod": {}}], [{"name": "colour", "valueCode": "red"}]):
            with self.subTest(parameter=parameter):
                self.assert_kept_out(path, 400, data={**good, "parameter": parameter})
        self.assert_kept_out(path, 400, data=made("Patient"))
        self.assert_refused(path, 415, form={"start": "2020"})
        self.assert_refused(path.replace(ME, OTHER), 403, data=good)
        self.assert_refused(path, 403, data=good, token=self.issue("patient/*.r"))
        self.assertIn(HIDDEN, self.get(path.replace(ME, OTHER), data=good, **OPENLY).text)

    def test_anothers_paging_link_opens_nothing(self) -> None:
        theirs = self.issue("user/*.rs", username="clinician", patient_id=OTHER)
        page = self.read(f"Observation?_count=1&patient=Patient/{OTHER}", token=theirs)
        self.assertIn(HIDDEN, json.dumps(page))
        links = {link["relation"]: link["url"] for link in page["link"]}
        path = links["next"][len(self.portal.fhir_url) + 1:]
        self.assertIn(HIDDEN, self.get(path, token=theirs).text)
        self.assertEqual(self.get(path).status, 403)

    def test_a_resource_is_mine_in_fhirs_spellings_of_my_name_and_with_nobody_else_contained(self) -> None:
        person, other, nothing = f"Patient/{ME}", to(f"Patient/{OTHER}"), cast(Any, [{}, None, []])
        me: Any = to(person)
        plain: Any = made("Questionnaire", item=[{"type": "reference"}])
        contained: list[tuple[int, Any]] = [
            (200, [observation("x"), made("Medication"), made("Specimen")]),
            *((200, [plain, inner]) for inner in (
                made("Provenance", target=[to("Observation/x")]), made("Provenance", target=[me, to("#")]),
                made("Group", member=[{"entity": me}]))),
            *((404, [plain, inner]) for inner in (
                made(f"Patient/{OTHER}"), observation("x", OTHER), *nothing,
                made("Bundle", entry=[{"resource": observation("y")}]),
                observation("x", contained=[observation("y")]), {"resourceType": ["Patient"]},
                made("Group", member=[{"entity": me}, {"entity": other}]),
                made("Group", member=[{"entity": {"type": "Patient", "identifier": {}}}]),
                made("Provenance", target=[other]), made("Coverage", subscriber=other),
                made("Observation", performer=[other]), made("List", entry=[{"item": other}]),
                made("Medication", extension=[[{"valueReference": other}]]),
                made("Parameters", parameter=[{"resource": observation("y")}]))), (404, "x")]
        subjects: list[tuple[int, Any]] = [
            *((200, to(text)) for text in (person, f"{person}/_history/2")), *((404, to(text)) for text in (
                "Group/1", "#p", f"patient/{ME}", f"{person}/x", f"{person}/", f"{person}#p", "Patient/..",
                f"/{person}", f"{person}?", f"{person},Patient/{OTHER}", f" {person}", [ME], None)),
            *((404, subject) for subject in (
                {"identifier": {"value": ME}}, {"display": "me"}, person, 7, [[person]], [me, {}]))]
        strays: list[tuple[int, Any]] = [(200, me), *((404, who) for who in (other, "x", [me, other]))]
        for name, cases in (("contained", contained), ("subject", subjects), ("for", strays)):
            for expected, value in cases:
                with self.subTest(name, value=value):
                    self.put(observation("mine", **{name: value}))
                    self.assertEqual(self.get("Observation/mine").status, expected)
                    self.assertEqual("mine" in self.ids("Observation?_count=1000"), expected == 200)

    def test_what_is_mostly_nobodys_is_of_whoever_it_names_and_then_of_a_category(self) -> None:
        narrow = token_for(self.portal, "problems")
        for name in ("Device", "Medication", "Questionnaire"):
            for who, token, expected in ((None, narrow, 200), (OTHER, self.token, 404), (ME, self.token, 200),
                                         (ME, narrow, 404)):
                with self.subTest(name, who=who, token=token):
                    self.put(made(f"{name}/{name}", **({"subject": to(f"Patient/{who}")} if who else {})))
                    self.assertEqual(self.get(f"{name}/{name}", token=token).status, expected)
                    self.assertEqual(name in self.ids(name, token=token), expected == 200)

    def test_a_binary_is_opened_by_what_points_to_it_or_by_itself(self) -> None:
        self.assertEqual(self.get("Binary/my-file").text, "hi")
        self.put(made("Binary/own", contentType="text/plain", securityContext=to(f"Patient/{ME}")))
        self.assertEqual(self.read("Binary/own")["id"], "own", "it has no bytes")
        unreached = self.issue("patient/Binary.rs patient/Observation.rs")  # which opens no document
        self.assert_refused("Binary/my-file", 404, token=unreached)
        self.put(document("my-doc", ME, "Binary/their-own"))  # it says itself whose it is
        self.assert_refused("Binary/their-own", 404, token=self.narrow_token())
        self.put(document("my-doc", ME, "Binary/x"), made("Binary/x", contained=[made(f"Patient/{OTHER}")]))
        self.assert_refused("Binary/x", 404)

    def test_a_binary_is_its_bytes_unless_fhirs_json_is_asked_for_by_name(self) -> None:
        fhir, plain, pdf = "application/fhir+json", "application/json", "application/pdf"
        kinds, data = ("text/html;charset=utf-8", "image/svg+xml", plain), {"data": "aGk="}
        cases: list[tuple[Any, str, str, str]] = [
            *((data, accept, "", "") for accept in (
                "", "*/*", pdf, "text/html, */*;q=0.1", fhir + ";q=0", f"{plain}, text/plain, */*")),
            *((data, accept, "", fhir) for accept in (fhir, f"{pdf}, {fhir};q=0.1", "application/json+fhir")),
            (data, plain, "", plain), (data, "", f"?_format={plain}", plain),
            (data, pdf, "?_format=json", fhir), (data, fhir, "?_format=text/x", ""),
            ({"content": "aGk="}, pdf, "", ""),
            *((without, "", "", fhir) for without in ({}, {"data": "aGk"}, {"data": 7}))]
        for contents, accept, query, is_json in cases:
            for kind in (*kinds, "x", "text/plain\r\nX: y", "text/plain" + 70_000 * " ",
                         "Multipart/x-mixed-replace;boundary=x"):  # its parts would have headers of their own
                with self.subTest(accept, query=query, contents=contents, kind=kind):
                    self.put(made("Binary/my-file", contentType=kind, **contents))
                    got = self.get(f"Binary/my-file{query}", headers={"Accept": accept})
                    if not is_json and kind not in kinds:  # it is of no type that it could be sent in
                        self.assertEqual(got.headers["content-type"], fhir)
                    else:
                        headers = [got.headers.get(name) for name in (
                            "content-type", "content-security-policy", "cache-control")]
                        sent = [is_json, None] if is_json else [kind, "sandbox"]
                        self.assertEqual((got.status, headers), (200, [*sent, "no-store"]))
                        self.assertEqual(*(got.json["contentType"], kind) if is_json else (got.text, "hi"))
        self.assert_refused("Binary/their-file", 404, headers={"Accept": "application/pdf"})

    def test_whoever_may_see_a_document_and_nobody_else_may_read_its_binary(self) -> None:
        self.put(document("group-doc", ME, "Binary/group-file") | {"subject": to("Group/1")},
                 made("Binary/group-file", contentType="text/plain", data="aGk="))
        narrow = token_for(self.portal, "vital-signs", username="clinician", scope="user/*.rs")
        clinician = self.issue("user/*.rs", username="clinician")
        readers = [self.issue(f"patient/DocumentReference.{letter} patient/Binary.r") for letter in "rs"]
        service = KeyedApp(self.portal).token(scope="system/Binary.r").json  # is all
        for token, name, status in (
                (clinician, "my-file", 200), (clinician, "group-file", 404), (narrow, "my-file", 404),
                (readers[0], "my-file", 200), (readers[1], "my-file", 200), (service, "group-file", 200)):
            self.assert_statuses(token, {f"Binary/{name}": status})

    def test_the_scopes_letters_and_types_hold(self) -> None:
        for scope in ("patient/*.s", "patient/*.r", "patient/Observation.rs"):  # it reads and searches
            got = self.assert_refused(f"Patient/{ME}/$everything", token=self.issue(scope))
            self.assertIn('error="insufficient_scope"', got.headers["www-authenticate"])
        scope = "patient/Observation.s patient/Practitioner.r"
        for path in ("Observation/mine", "Practitioner", "Patient", f"Patient/{ME}", "Binary/my-file"):
            before = self.asked_behind()
            self.assert_refused(path, token=self.issue(scope))
            self.assertEqual(self.asked_behind(), before)
        included = self.ids("Observation?_count=1000&_include=Observation:performer", token=self.issue(scope))
        self.assertEqual({"mine", "dr"} & set(included), {"mine"})

    def test_what_the_person_left_out_by_its_type_is_refused_by_its_category_not_there(self) -> None:
        hl7, scope = "http://terminology.hl7.org/CodeSystem/observation-category", "patient/Observation.rs"
        self.put(*(observation(code, category=[{"coding": [{"system": hl7, "code": code}]}])
                   for code in ("laboratory", "vital-signs")))
        token = token_for(self.portal, "laboratory", scope=f"launch/patient {scope} patient/Condition.rs")
        self.assert_statuses(token, {"Observation/laboratory": 200, "Observation/vital-signs": 404,
            "Observation/mine": 404, "Condition/x": 403, "Condition": 403})
        found = self.ids("Observation?_count=1000", token=token)
        self.assertEqual({"laboratory", "vital-signs", "mine"}.intersection(found), {"laboratory"})

    def test_laboratory_and_smoking_are_told_by_codes_of_their_systems(self) -> None:
        hl7, local = "http://terminology.hl7.org/CodeSystem/v2-0074", "http://local.example"
        smokes, else_, social = ("http://loinc.org", "72166-2"), ("http://loinc.org", "1-8"), "social-history"
        for label, names, cases in (
                ("laboratory", ("Observation", "DiagnosticReport"), (
                    (("", "LAB"), else_, 200), (("http://hl7.org/fhir/v2/0074", "LAB"), else_, 200),
                    *(((hl7, code), else_, 200) for code in ("HM", "CH", "MB")),
                    ((hl7, "RAD"), else_, 404), ((local, "CH"), else_, 404))),
                ("smoking", ("Observation",), (
                    (("", social), else_, 200), (("", "survey"), smokes, 200), (("", "survey"), else_, 404),
                    (("", "survey"), (local, "72166-2"), 404)))):
            token = token_for(self.portal, label)
            for name, (category, code, expected) in itertools.product(names, cases):
                with self.subTest(name, category=category, code=code):
                    two = [{"coding": [{"system": uri, "code": word}]} for uri, word in (category, code)]
                    self.put({**observation("x"), "resourceType": name, "category": two[:1], "code": two[1]})
                    self.assertEqual(self.get(f"{name}/x", token=token).status, expected)

    def test_who_the_user_is_may_be_read_and_not_searched_and_tells_of_nobody_else(self) -> None:
        drug, theirs = made("Medication"), observation("x", OTHER)
        for username, name, key in (("daniel-adams", "Patient", ME),
                                    ("clinician", "Practitioner", "smart-clinician")):
            path = f"{name}/{key}"
            token = self.issue("openid fhirUser patient/Observation.rs", username=username, patient_id=ME)
            for more, expected in (({}, 200), ({"contained": [drug]}, 200), ({"contained": [theirs]}, 404)):
                with self.subTest(path, more=more):
                    self.put({"resourceType": name, "id": key, **more})
                    self.assertEqual(self.get(path, token=token).status, expected)
            for other in ("Practitioner/dr", f"Patient/{OTHER}", f"{path}/$everything", f"{name}?_id={key}"):
                self.assert_refused(other, token=token)
        token = token_for(self.portal, "problems", scope="openid fhirUser launch/patient patient/*.rs")
        self.put(made(f"Patient/{ME}"))
        self.assertEqual(self.get(f"Patient/{ME}", token=token).status, 200)
        self.assertNotIn(ME, self.ids("Patient", token=token))


class OnePatientOfAnotherServer(OnePatientAndNothingElse, ForwardingTest):
    """The same attacks on the records of a FHIR server that does nothing against them."""
    def setUp(self) -> None:
        super().setUp()
        self.script("metadata", WhatIsBehind.STATEMENT)
        for name in ("Observation/deleted", "Binary/deleted"):
            self.script(name, {}, 410)
        for query in (f"?_count=1&patient=Patient/{OTHER}", "?page=2"):
            self.script(f"/fhir/Observation{query}", [observation("theirs", OTHER, code={"text": HIDDEN})],
                        next="?page=2")
        self.during(mock.patch.object(self.behind, "answer", self.answer))

    def answer(self, target: str) -> Any:
        """What that server answers: not modified, to anyone who says that they know the resource."""
        answer, sent = FhirServer.answer(self.behind, target), self.behind.seen[-1][1]
        is_known = answer[0] == 200 and {"if-none-match", "if-modified-since"} & sent.keys()
        return json_answer(b"", 304, ETag='W/"7"') if is_known else answer

    def put(self, *resources: dict[str, Any]) -> None:
        for resource in resources:
            self.behind.records[f"{resource['resourceType']}/{resource['id']}"] = resource

    def stored(self) -> Any:
        """All that is there, and all that was sent there to be written."""
        return dict(self.behind.records), [seen for seen in self.behind.seen
                                           if "json" in seen[1].get("content-type", "")]

    def assert_kept_out(self, path: str, status: int = 403, **how: Any) -> None:
        """An attack is refused before that server is asked."""
        before = len(self.behind.seen)
        self.assertIn(self.get(path, **how).status, (status, 400, 403))
        self.assertEqual(len(self.behind.seen), before)


class WritingHere(RecordTest):
    """What apps write to the records kept here."""
    def test_of_writers_who_saw_one_version_one_wins(self) -> None:
        new, statuses = self.write("Observation", observation("x")).json, list[int]()
        path = f"Observation/{new['id']}"
        with together(8, lambda: statuses.append(self.write(path, new, **{"If-Match": 'W/"1"'}).status)):
            pass
        self.assertEqual((sorted(statuses), self.read(path)["meta"]["versionId"]), ([200] + 7 * [412], "2"))

    def test_a_text_costs_no_more_than_its_length(self) -> None:
        begun, text = time.process_time(), "/binary/" * 100_000 + " \0x"
        nested: Any = [1] * 100_000 + ["\U0001f600"]
        for _ in range(90):
            nested = {"url": nested}
        for note in ({"text": text}, nested):
            self.assertEqual(self.write("Observation", observation("x", note=[note])).status, 201)
        self.assertLess(time.process_time() - begun, 2)

    def test_no_load_makes_anothers_of_what_was_written_and_a_reset_takes_it_back(self) -> None:
        other = to("Patient?identifier=https://ids.example|1")
        elsewhere = "https://elsewhere.example/fhir/Binary/their-file"
        doc = self.write("DocumentReference", document("x", ME, elsewhere)).json
        seen = self.write("Observation", observation("x", performer=[other, to("urn:uuid:other")])).json
        identifier = {"system": "https://ids.example", "value": "1"}
        self.portal.load(bundle_of(made("Binary/their-file", contentType="text/plain"),
                                   made("Patient/other", identifier=[identifier])))
        for was in (doc, seen):
            self.assertEqual(self.read(f"{was['resourceType']}/{was['id']}"), was)
        self.assert_refused("Binary/their-file", 404)
        smoked, before = "Condition/smart-Condition-14", self.read("Condition/smart-Condition-14")
        self.assertEqual(self.write(smoked, {**before, "note": [{"text": "new"}]}).status, 200)
        self.assertEqual(self.read(smoked)["meta"]["versionId"], "2")
        self.portal.reset()
        self.token = self.issue(self.scope)
        self.assertEqual(self.read(smoked), before)
        self.assert_refused(f"Observation/{seen['id']}", 404)

    def test_no_load_takes_an_apps_word_for_who_somebody_is(self) -> None:
        own, taken = ({"identifier": [{"system": "https://ids.example", "value": key}]} for key in "67")
        theirs, path = self.issue("patient/*.rs", username="joseph-ross"), f"Patient/{ME}"

        def put(**more: Any) -> None:
            self.assertEqual(self.write(path, {**self.read(path), **more}).status, 200)

        def load(name: str, key: str, *more: Any) -> None:
            about = to(f"Patient?identifier=https://ids.example|{key}")
            self.portal.load(bundle_of(*more, observation(name, subject=about)))
        self.portal.load(made(path, **own))
        put(active=True)
        load("own", "6")  # by an identifier that the app left alone
        self.read("Observation/own")
        put(**taken)
        put(active=False)
        for name, more in (("a", [made(f"Patient/{JOSEPH}", **taken)]), ("b", [])):
            load(name, "7", *more)
            self.assert_refused(f"Observation/{name}", 404)
            self.read(f"Observation/{name}", token=theirs)
        self.portal.load(made(f"Patient/{JOSEPH}"))
        self.portal.load({**self.read(path), "active": True})  # now it is the word of who loads
        load("c", "7")
        self.read("Observation/c")

    def test_a_token_of_before_a_reset_writes_nothing_after_it(self) -> None:
        records, statuses = self.portal.portal.records, list[int]()
        reset, token = records.reset, self.issue("patient/*.crus")

        def reset_and_write() -> None:
            reset()
            statuses.append(self.write("Observation", observation("x"), token).status)
        with mock.patch.object(records, "reset", reset_and_write):
            self.portal.reset()
        self.assertEqual(statuses, [401])
        sent, token = s4s.sent_resource, self.issue("patient/*.crus")

        def reset_first(*asked: Any) -> Any:
            self.portal.reset()  # the token was looked at, nothing is written yet
            return sent(*asked)
        with mock.patch.object(s4s, "sent_resource", reset_first):
            self.assertEqual(self.write("Observation", observation("x"), token).status, 403)

    def test_each_version_of_fhir_is_written_in_its_own_way_and_metadata_says_what_can_be(self) -> None:
        for version, kind in (("dstu2", "application/json+fhir"), ("stu3", "application/fhir+json"),
                              ("r4", "application/fhir+json")):
            with self.subTest(version), s4s.Server(fhir_version=version, open_fhir=True) as portal:
                token = portal.issue_token(scope="patient/*.crus")
                got = ask(f"{portal.fhir_url}/Observation", data=observation("x"), token=token)
                self.assertEqual((got.status, got.headers["content-type"]), (201, kind), got)
                wrong = {"resourceType": "Condition", "patient" if version != "dstu2" else "subject": {
                    "reference": f"Patient/{ME}"}, "clinicalStatus": {} if version != "r4" else "active"}
                self.assertIn(ask(f"{portal.fhir_url}/Condition", data=wrong, token=token).status, (400, 403))
                for base, expected in ((portal.fhir_url, {
                        "Patient": {"update"}, "Observation": {"create", "update"}, "Practitioner": set(),
                        "Binary": {"create", "update"}}), (portal.open_fhir_url, {"Observation": set()})):
                    for resource in ask(f"{base}/metadata").json["rest"][0]["resource"]:
                        codes = {code["code"] for code in resource["interaction"]} - {
                            "read", "vread", "search-type"}
                        self.assertEqual(codes, expected.get(resource["type"], codes))
        scopes = self.fhir(".well-known/smart-configuration").json["scopes_supported"]
        self.assertEqual({"patient/*.cu", "user/*.write", "system/*.cu"} & {*scopes},
                         {"patient/*.cu", "user/*.write"})


class WritingBehind(ForwardingTest):
    """What apps write to a FHIR server behind that does with it what it likes."""
    def test_it_gets_what_was_judged_in_its_own_addresses_and_for_the_version_that_was_judged(self) -> None:
        ours, theirs = self.portal.fhir_url, self.behind.url
        text = ('{"resourceType": "Observation", "id": "mine", "subject": {"reference": "%s/Patient/' + ME
                + '"}, "valueQuantity": {"value": 5.40}, "note": [{"text": "at %s and %sx"}]}')
        for path, method in (("Observation/mine", "PUT"), ("Observation", "POST")):
            with self.subTest(path):
                sent = text if method == "PUT" else text.replace('"id": "mine", ', "")
                got = self.write(path, (sent % (ours, ours, ours)).encode(),
                                 **{"Prefer": "return=minimal, respond-async", "If-Match": '"7"'})
                target, headers, body = self.behind.seen[-1]
                self.assertEqual((target, body.decode()), (f"/fhir/{path}", sent % (theirs, ours, ours)))
                names = (":method", "if-match", "prefer", "authorization")
                self.assertEqual([headers.get(name) for name in names], [
                    method, 'W/"7"' if method == "PUT" else None, "return=representation", None])
                self.assertEqual((got.body, got.headers["etag"]), (b"", 'W/"8"'))
                self.assertTrue(got.headers["location"].startswith(f"{ours}/Observation/"))
                self.assertNotIn(str(self.behind.port), str(got.headers))
        for slash in ("\\/", "/"):
            self.write("Observation", (sent % (ours, ours, ours)).replace("/", slash).encode())
            self.assertIn((theirs + "/Patient/").encode(), self.behind.seen[-1][2].replace(b"\\/", b"/"))
        self.write("Observation", observation("theirs"))
        self.assertEqual(json.loads(self.behind.seen[-1][2]).get("id"), None, "it would write there")

    def test_what_it_made_of_it_is_judged_too(self) -> None:
        mine = observation("mine")
        outcome = made("OperationOutcome", issue=[{"diagnostics": self.behind.url}])
        for why, answer, status in (
                ("another's", observation("mine", OTHER), 502), ("nobody's", {**mine, "subject": {}}, 502),
                ("another's in it", {**mine, "contained": [observation("y", OTHER)]}, 502),
                ("another type", {**mine, "resourceType": "Condition"}, 502),
                ("no id", {**mine, "id": 7}, 502), ("no FHIR", b"<html>", 502),
                ("its words", outcome, 201), ("nothing", b"", 201)):
            for verb, path, name, code in (("POST", "Observation", "new", 201),
                                           ("PUT", "Observation/mine", "mine", 200)):
                with self.subTest(why, path=path):
                    self.script(f"{verb} {path}", answer, code, {
                        "Location": f"{self.behind.url}/Observation/{name}/_history/2"})
                    got = self.write(path, mine)
                    self.assertEqual(got.status, {201: code}.get(status, status), got)
                    self.assertNotIn(OTHER, got.text)
                    self.assertNotIn(str(self.behind.port), got.text + str(got.headers))
                    if got.status < 300:
                        self.assertEqual((got.body, got.headers["location"]), (
                            b"", f"{self.portal.fhir_url}/Observation/{name}/_history/2"))
        for why, scope, sent, answer in (
                ("another's whom the token reaches", "user/*.crus", mine, observation("mine", OTHER)),
                ("of another status", "patient/Observation.crus?status=final", mine,
                 {**mine, "status": "draft"})):
            with self.subTest(why):
                token = self.issue(scope, username="clinician", patient_id=ME)
                self.script("PUT Observation/mine", answer)
                self.assertEqual(self.write("Observation/mine", sent, token).status, 502)
        self.script("POST Observation", b"", 201)
        self.assertEqual(self.write("Observation", mine).status, 502, "it does not say where")
        self.script("PUT Observation/mine", observation("other-id"), 200)
        self.assertEqual(self.write("Observation/mine", mine).status, 502)

    def test_its_refusals_come_as_those_of_reads_and_no_write_is_made_twice_or_elsewhere(self) -> None:
        for status, expected in ((400, 400), (401, 502), (403, 502), (404, 404), (409, 409), (410, 404),
                                 (412, 412), (422, 400), (429, 429), (500, 502), (503, 503), (307, 502)):
            with self.subTest(status):
                self.script("PUT Observation/mine", made("Observation"), status,
                            {"Retry-After": "2", "Location": f"{self.behind.url}/Observation/theirs"})
                before, got = len(self.behind.seen), self.write("Observation/mine", observation("mine"))
                self.assertEqual((got.status, got.json["resourceType"]), (expected, "OperationOutcome"))
                self.assertEqual(got.headers.get("retry-after"), "2" if status in (429, 503) else None)
                self.assertEqual(len(self.behind.seen), before + 2)
        self.behind.script["POST Observation"] = b""  # it breaks off, whatever it did with it
        before = len(self.behind.seen)
        self.assertEqual(self.write("Observation", observation("x")).status, 502)
        self.assertEqual(len(self.behind.seen), before + 1)

    def test_no_reference_makes_it_search_others_records(self) -> None:
        base, behind = self.portal.fhir_url, self.behind.url
        for text in ("Patient?family=Shaw", f"Observation?patient={OTHER}&code=x", f"{base}/Patient?_id=x",
                     f"{behind}/Patient?birthdate=1999", "https://elsewhere.example/Practitioner?x"):
            for more in ({"performer": [{"reference": [text]}]}, {"extension": [{"valueReference": {
                    "reference": text}}]}, {"contained": [observation("x", performer={"reference": text})]}):
                for path in ("Observation", "Observation/mine"):
                    with self.subTest(text, more=more, path=path):
                        self.assertEqual(self.write(path, observation("mine", **more)).status, 403)
                        self.assertEqual({seen[1][":method"] for seen in self.behind.seen} - {"GET"}, set())

    def test_two_members_of_one_name_are_refused(self) -> None:
        text = json.dumps(observation("mine")).replace('"subject"', '"subject": {}, "subject"')
        self.assertEqual((self.write("Observation/mine", text.encode()).status, self.behind.seen), (400, []))


class HostileAnswers(ForwardingTest):
    """Attacks on the record's boundary that the FHIR server itself makes."""
    def test_resources_are_read_by_whose_they_are(self) -> None:
        new, mine, by_address = "Observation/mine", observation("mine"), f"{self.behind.url}/Patient/{ME}"
        old = f"{new}/_history/1"
        for attack, path, scripted, expected in (("my own resource in an older version", old, mine, 200),
                ("mine by an address", new, {**mine, "subject": to(by_address)}, 200),
                ("a version that was another patient's", old, observation("mine", OTHER), 404),
                ("another resource than the one asked for", new, observation("theirs"), 502),
                ("a type that is no text", new, {**mine, "resourceType": ["Observation"]}, 502),
                ("an id that is no text", new, {**mine, "id": ["mine"]}, 502)):
            with self.subTest(attack):
                self.script(path, scripted)
                self.assertEqual(self.get(path).status, expected)

    def test_a_search_is_pinned_to_the_patient(self) -> None:
        pin, since = f"patient=Patient/{ME}", "_since=2026-01-01T00:00:00Z"
        ours, away = self.portal.fhir_url, "https://elsewhere.example/fhir/Encounter/6"
        everything = f"Patient/{ME}/$everything?_count=5&{since}&_type=Patient,Goal&start=2020&end=2021"
        for path, expected in (
                *((f"Observation?{query}", f"Observation?{query}&{pin}") for query in (
                    "code=x", "_source=urn:x&_language=de", "_sort:desc=date")),  # that of DSTU2, too
                (f"Observation?encounter={ours}/Encounter/5,{away}&code={ours}/CodeSystem/x|1",
                 f"Observation?encounter=Encounter/5,{away}&code={self.behind.url}/CodeSystem/x|1&{pin}"),
                *((f"Observation?{query}", f"Observation?{pin}") for query in (
                    f"patient={ME}", f"subject=Patient/{ME}", f"subject:Patient={ME}",
                    f"patient={ours}/Patient/{ME}")),
                ("Coverage", f"Coverage?beneficiary=Patient/{ME}"),
                ("Patient?name=x", f"Patient?name=x&_id={ME}"),
                (f"Patient/{ME}/Observation", f"Observation?{pin}"),
                # Parts of resources are not asked for: they could not be judged.
                ("Observation?_elements=code&_summary=true&_format=json", f"Observation?{pin}"),
                (everything, everything)):
            with self.subTest(path):
                self.get(path)
                self.assertEqual([target for target, _, _ in self.behind.seen], [f"/fhir/{expected}"])
                self.behind.seen.clear()
        self.assertIn("mine", self.ids("Observation/_search", form={"code": "a b"}))
        target, headers, body = self.behind.seen[-1]
        self.assertEqual(target, "/fhir/Observation/_search")
        self.assertEqual(body, f"code=a%20b&patient=Patient/{ME}".encode())
        self.assertEqual(headers["content-type"], "application/x-www-form-urlencoded")

    def test_a_provenance_is_of_the_patient_of_all_its_targets(self) -> None:
        records = self.behind.records
        records["Provenance/q"] = made("Provenance/q", target=[to("Observation/mine")])
        mine, theirs, both = "Observation/mine", "Observation/theirs", [f"Patient/{ME}", f"Patient/{OTHER}"]
        for name in ("mine", "theirs"):
            self.script(f"/fhir/Observation?_id={name}&_count=100", [records[f"Observation/{name}"]])
        for why, page, targets, seen in (
                ("it came with it", [mine], [mine], True), ("the patient", [], [f"Patient/{ME}"], True),
                ("asked for", [], [mine, f"{self.behind.url}/{mine}/_history/1"], True),
                ("with somebody whose record this is not", [mine], [mine, "Practitioner/dr"], True),
                ("nobody alone", [mine], ["Practitioner/dr"], False), ("none", [mine], [], False),
                ("another patient's", [mine], [theirs], False), ("both patients", [mine], both, False),
                ("of both", [mine, theirs], [mine, theirs], False),
                ("with what is not there", [mine], [mine, "Observation/nope"], False),
                ("another Provenance", ["Provenance/q", mine], [mine, "Provenance/q"], False),
                ("elsewhere", [mine], [f"https://elsewhere.example/{mine}"], False)):
            with self.subTest(why):
                records["Provenance/p"] = made("Provenance/p", target=[*map(to, targets)])
                self.script("Observation", [records["Provenance/p"], *(records[name] for name in page)])
                found = self.ids(f"Observation?patient={ME}&_revinclude=Provenance:target")
                self.assertEqual(["p" in found, self.get("Provenance/p").status == 200], [seen] * 2)
                self.assertNotIn("p", self.ids("Observation", token=self.issue("patient/Observation.rs")))

    def test_provenances_of_many_things_do_not_vanish_and_are_asked_for_a_type_at_a_time(self) -> None:
        answer, types = self.behind.answer, ("Condition", "Goal")

        def in_pages(target: str) -> Any:
            path, _, query = target.partition("?_id=")
            if not query:
                return answer(target)
            ids = query.partition("&")[0].split(",")
            self.assertLessEqual(len(ids), 100)
            link = f"{path}?_id={','.join(ids[size:])}&_count=100" if ids[size:] else ""
            return json_answer(self.behind.bundle(*({**observation(name), "resourceType": path[6:]}
                                                    for name in ids[:size]), next=link))
        for number, targets, size, lookups in (
                (60, 2, 100, 2), (99, 3, 100, 3), (1, 101, 100, 2), (50, 2, 30, 4), (2000, 1, 100, 20)):
            with self.subTest(number=number, targets=targets), \
                    mock.patch.object(self.behind, "answer", in_pages):
                about = [made(f"Provenance/p{place}", target=[
                    to(f"{types[part % 2]}/c{place}-{part}") for part in range(targets)])
                    for place in range(number)]
                self.script("Provenance", about)
                self.script("Provenance/p0", about[0])
                self.behind.seen.clear()
                self.assertEqual(len(self.ids(f"Provenance?_count={number}")), number)
                self.assertEqual(len(self.behind.seen), 1 + lookups)
                self.assertEqual(self.read("Provenance/p0")["id"], "p0")

    def test_whose_a_provenance_is_may_be_asked_for_at_a_busy_time(self) -> None:
        about = made("Provenance/p", target=[to("Condition/c")])
        self.script("Provenance/p", about)
        self.script("Provenance", [about])
        for status, told, found in ((503, 503, 503), (429, 429, 429), (404, 404, 200), (403, 404, 200)):
            self.script("Condition", {}, status, {"Retry-After": "7"})
            for path, expected in (("Provenance/p", told), ("Provenance", found)):
                with self.subTest(path, status=status):
                    got, wait = self.get(path), "7" if status in (503, 429) else None
                    self.assertEqual((got.status, got.headers.get("retry-after")), (expected, wait))

    def test_what_comes_along_in_a_bundle_is_judged_by_itself(self) -> None:
        mine, theirs = observation("mine", performer=[to(f"Patient/{OTHER}")]), observation("x", OTHER)
        within, quotation = {**self.behind.bundle(theirs), "id": "b"}, made("OperationOutcome/o", text=OTHER)
        for resource in (made(f"Patient/{OTHER}"), within, quotation):
            self.script("Observation", [mine, resource])
            self.assertEqual(self.ids("Observation?_include=Observation:performer"), ["mine"], resource)

    def test_what_stands_beside_a_resource_is_the_portals_own_word(self) -> None:
        said = {"signature": {"who": OTHER}, "issues": OTHER, "id": OTHER, "timestamp": OTHER, "total": OTHER,
                "meta": {"tag": [{"code": OTHER}]}}
        for mode in ("match", "include", OTHER, 7):
            bundle = {**self.behind.bundle(self.behind.records["Observation/mine"]), **said}
            bundle["entry"][0].update(response={"location": OTHER}, fullUrl=f"urn:{OTHER}",
                                      search={"mode": mode, "score": OTHER, "rank": OTHER})
            self.script("Observation", bundle)
            for how in ({}, OPENLY):
                [entry] = self.read("Observation", **how)["entry"]
                self.assertEqual(entry["search"], {"mode": "include" if mode == "include" else "match"})
                self.assertRegex(entry["fullUrl"], rf"^{self.portal.url}/api/(open-)?fhir/Observation/mine$")
                self.assertNotIn(OTHER, self.get("Observation", **how).text)

    def test_the_first_of_two_members_of_one_name_does_not_get_out(self) -> None:
        text, theirs = json.dumps(observation("mine", note="n")), json.dumps(observation("x", OTHER))
        for name, first in (("subject", f'{{"reference": "Patient/{OTHER}"}}'), ("note", f'"{OTHER}"'),
                            ("text", f'"{OTHER}"'), ("\\u006eote", f'"{OTHER}"')):
            last = f'"{name}"'.replace("\\u006e", "n")
            twice = text.replace(last, f'"{name}": {first}, {last}')
            for path, body in (("Observation/mine", twice), ("Observation", f'[{{"resource": {twice}}}]'),
                    ("Observation", f'[{{"resource": {theirs}, "resource": {text}}}]'),
                    ("Observation", f'[{{"resource": {text}}}], "entry": [{{"resource": {theirs}}}]')):
                with self.subTest(name, body=body):
                    head = '{"resourceType": "Bundle", "type": "searchset", "entry": '
                    self.script(path, (f"{head}{body}}}" if body[0] == "[" else body).encode())
                    got = self.get(path)
                    self.assertIn(got.status, (200, 502))
                    self.assertNotIn(OTHER, got.text)

    def test_no_depth_of_json_is_an_error_of_the_portals_own(self) -> None:
        form = made("QuestionnaireResponse/r", questionnaire="Questionnaire/q", subject=to(f"Patient/{ME}"))
        token = self.issue("patient/*.rs patient/Observation.rs?status=final")  # includes are read again
        file: Any = made("Binary/my-file", contentType="text/plain", data="aGk=", x="deep")
        page = self.behind.bundle(form, made("Questionnaire/q", x="deep"))
        page["entry"][1]["search"] = {"mode": "include"}
        for depth in range(940, 1000):  # at about 1000, Python refuses to read it at all
            deep = "[" * depth + "]" * depth
            for path, body in (("Binary/my-file", file), ("QuestionnaireResponse", page)):
                self.script(path, json.dumps(body).replace('"deep"', deep).encode())
                with self.subTest(path, depth=depth):
                    self.assertIn(self.get(path, token=token).status, (200, 502))

    def test_json_of_the_wrong_type_shows_nothing_and_breaks_nothing(self) -> None:
        report = made("DiagnosticReport/r", subject=to(f"Patient/{ME}"))
        self.script("Binary/my-file", made("Binary/my-file", securityContext=7))
        tokens = {self.token: ["m1", "m2", "r"], token_for(self.portal, "vital-signs"): [],
                  self.issue("patient/*.rs?status=final"): ["m2"]}
        values: list[Any] = [["Patient"], {"a": ["b"]}, 7, None, True, [[]], "\ud800"]
        for wrong in values:
            unplaced = [{**observation("x"), "resourceType": wrong}, {"resourceType": "Patient", "id": wrong},
                        observation("x", subject=wrong), observation("x", subject=to(wrong)),
                        made("Appointment/a", participant=wrong)]
            placed = [observation("m1", category=wrong, code=wrong, status=wrong, performer=wrong),
                observation("m2", meta=wrong, category=[{"coding": [wrong, {"code": wrong, "system": 7}]}]),
                {**report, "category": wrong, "presentedForm": [wrong, {"url": wrong}]}]
            bundle = made("Bundle", type="searchset", link=[wrong, {"relation": wrong, "url": wrong}], entry=[
                wrong, {"resource": wrong}, *({"resource": resource, "search": wrong}
                                              for resource in (*unplaced, *placed))])
            for path in ("Observation", f"Patient/{ME}/$everything", "DocumentReference", "DiagnosticReport"):
                self.script(path, bundle)
            for token, expected in tokens.items():
                for path in ("Observation", f"Patient/{ME}/$everything"):
                    with self.subTest(path, wrong=wrong, expected=expected):
                        self.assertEqual(self.ids(path, token=token), expected)
                self.assertEqual(self.get("Binary/my-file", token=token).status, 404)
            for path in ("Observation", "Observation?_elements=code"):
                self.assertEqual(self.get(path, **OPENLY).status, 200)

    def test_a_reference_under_another_name_of_the_server_is_its_own_once_it_tells_that_name(self) -> None:
        there, log = "http://other.example/fhir", log_of(self.portal)
        named, theirs = (observation(name, subject=to(f"{there}/Patient/{patient}"))
                         for name, patient in (("mine", ME), ("theirs", OTHER)))
        self.script("Observation/mine", named)
        for link, expected in (("", []), (f"{there}/Observation", ["mine"])):
            self.assertNotEqual(self.get("Observation/mine").status, 200)
            self.script("Observation", [named, theirs], self=link)
            self.assertEqual(self.ids("Observation"), expected)
        self.assertEqual(self.read("Observation/mine")["id"], "mine")
        entries: Any
        for entries in ([observation("theirs", OTHER)], [], [observation("x", "?"), observation("mine")]):
            self.script("Observation", entries)
            self.get("Observation")
        [line] = log  # of the one page that showed nothing because nobody could tell
        self.assertIn("nobody can tell whose the 2 resources are", line)

    def test_a_clinician_sees_every_record_and_a_representative_those_of_both(self) -> None:
        token = self.issue("user/*.rs", username="clinician", patient_id=ME)
        self.assertEqual(self.read("Observation/theirs", token=token)["id"], "theirs")
        self.assertIn("theirs", self.ids("Observation", token=token))
        self.script("Observation", [observation(who, who) for who in (ME, AMY, OTHER)])
        self.assertEqual(self.ids("Observation", token=self.issue("user/*.rs")), [ME, AMY])
        self.assertIn(f"patient=Patient/{AMY},Patient/{ME}", self.behind.seen[-1][0])

    def test_what_points_to_a_binary_is_remembered_and_for_a_minute_that_nothing_does(self) -> None:
        for name, seconds, asked in (("my", 0, 3), ("my", 0, 1), ("their", 0, 3), ("their", 59, 1),
                                     ("their", 1, 3)):
            with self.subTest(name, seconds=seconds):
                self.portal.advance(seconds)
                self.behind.seen.clear()
                got = self.get(f"Binary/{name}-file")
                self.assertEqual((got.status, len(self.behind.seen)), (200 if name == "my" else 404, asked))
        self.script("DiagnosticReport", [made(
            "DiagnosticReport/r", subject=to(f"Patient/{ME}"), presentedForm=[{"url": "Binary/my-file"}])])
        again = "/fhir?_getpages=again"
        for status, found in ((404, 200), (200, 404)):  # a search without an end ends all the same
            self.script("DocumentReference", [], status, next=again)
            self.script(again, [], next=again)
            self.portal.reset()
            self.behind.seen.clear()
            self.assertEqual(self.get("Binary/my-file", token=self.issue(self.scope)).status, found)
            self.assertLess(len(self.behind.seen), 30)


class WhatIsHiddenIsNotCounted(ForwardingTest):
    """A token for vital signs alone, before a server that filters and pages well, three to a page: neither a
    link nor a number nor an empty place tells what else is there."""
    def setUp(self) -> None:
        super().setUp()
        self.stored: list[dict[str, Any]] = []
        self.during(mock.patch.object(self.behind, "answer", self.answer))
        self.narrow = token_for(self.portal, "vital-signs")
        self.behind.seen.clear()

    def answer(self, target: str) -> Any:
        """What was scripted, or some of `stored`, by _offset and _count; with their number."""
        if self.behind.script:
            return FhirServer.answer(self.behind, target)
        query = dict(parse_qsl(urlsplit(target).query))
        offset, count = int(query.get("_offset", 0)), min(3, int(query.get("_count", 3)))
        end, links = offset + count, {"previous": f"{self.behind.url}/Observation"}
        if end < len(self.stored):
            links["next"] = f"{self.behind.url}/Observation?_count={count}&_offset={end}"
        page = self.behind.bundle(*self.stored[offset:end], **links)
        return json_answer({**page, "total": len(self.stored)})

    def fill(self, kinds: str) -> None:
        """Observations: v may be seen, h not."""
        codes = {"v": "vital-signs", "h": "laboratory"}
        self.stored = [observation(f"{kind}{number}", category=[{"coding": [{"code": codes[kind]}]}])
                       for number, kind in enumerate(kinds)]

    def including(self, *included: dict[str, Any]) -> None:
        """Answer with all of `stored` on one page, and with what was included."""
        page = {**self.behind.bundle(*self.stored, *included), "total": len(self.stored)}
        for entry in page["entry"][len(self.stored):]:
            entry["search"] = {"mode": "include"}
        self.script("Observation", page)

    def shown(self, path: str, **how: Any) -> str:
        """A page for the token, less what is different each time."""
        page = self.read(path, token=self.narrow, **how)
        self.assertNotIn("total", page)
        page["link"] = [link["relation"] for link in page["link"]]
        return re.sub(r"v\d+", "v", json.dumps(page))

    def test_what_is_hidden_leaves_no_trace(self) -> None:
        for seen, with_hidden in (("v", "vh"), ("v", "hhhhhhhhv"), ("v", "hhhhhhvhhhhhhh"), ("", "hhhhhhh"),
                                  ("vv", "vhhhhvhhh"), ("vvv", "hvhvhvhhhhhh")):
            for query in ("_count=1", "_count=2", "_count=3", "_count=20", "_summary=count", "_count=0"):
                for path, how in (("Observation", {}), ("Observation/_search", {"form": {"code": "x"}})):
                    with self.subTest((seen, with_hidden, query, path)):
                        self.fill(seen)
                        expected = self.shown(f"{path}?{query}", **how)
                        self.fill(with_hidden)
                        self.assertEqual(self.shown(f"{path}?{query}", **how), expected)

    def test_all_that_may_be_seen_comes_once_in_full_pages_or_after_an_empty_one(self) -> None:
        some, stretch = "hvvvhhhhhvhvvhvhhhhhvvvvv" * 2, 3 * s4s.MAX_PAGES
        for kinds, size, empty in (*((some, size, []) for size in (1, 2, 3, 4, 7, 100)),
                                   ("h" * stretch + "v", 20, [0])):
            self.fill(kinds)
            expected = [resource["id"] for resource in self.stored if resource["id"][0] == "v"]
            for path, how in ((f"Observation?_count={size}", {}),
                              ("Observation/_search", {"form": {"_count": str(size)}})):
                with self.subTest(kinds, size=size, path=path):
                    self.behind.seen.clear()
                    self.read(path, token=self.narrow, **how)
                    self.assertLessEqual(len(self.behind.seen), s4s.MAX_PAGES)
                    walk = pages_from(f"{self.portal.fhir_url}/{path}", self.narrow, **how)
                    found = [*map(ids_within, walk)]
                    self.assertEqual([*itertools.chain(*found)], expected)
                    self.assertEqual({len(page) for page in found[:-1]}, {*empty} or {size} - {100})

    def test_the_servers_total_comes_only_where_it_was_seen_to_be_true(self) -> None:
        self.fill("vhvhv")
        self.assertNotIn("total", self.read("Observation"), "there are more pages")
        self.fill("vh")
        self.assertEqual(self.read("Observation")["total"], 2)
        by_parameter = self.issue("patient/Observation.rs?status=final")
        self.assertNotIn("total", self.read("Observation", token=by_parameter), "?param=value narrows it")
        self.script("Observation", {**self.behind.bundle(*self.stored), "total": 7})
        self.assertNotIn("total", self.read("Observation"), "it counts more than came")
        self.behind.script.clear()
        self.stored[1] = observation("h1", OTHER)
        for path in ("Observation?_count=1", "Observation"):
            self.assertNotIn("total", self.read(path), "the other one is somebody else's")

    def test_a_number_asked_for_is_counted_here(self) -> None:
        self.assert_not_forwarded("Observation?_count=-1", 400)
        for query, number in (("_summary=count", 0), ("_count=0", 0), ("_total=accurate", 3),
                              ("_total=accurate&_count=2", 2), ("_total=accurate&_count=100", 3)):
            with self.subTest(query):
                self.fill("vhvhvhv")
                page = self.read(f"Observation?{query}")
                self.assertEqual((page["total"], len(page.get("entry", []))), (7, number))
                self.assertEqual("next" in str(page["link"]), number > 0)
                self.assertNotIn("total", self.read(f"Observation?{query}", token=self.narrow))
                self.stored[6] = observation("v6", OTHER)
                self.assertNotIn("total", self.read(f"Observation?{query}"))
                self.fill("v" * (3 * s4s.MAX_PAGES + 1))
                self.assertNotIn("total", self.read(f"Observation?{query}"), "too many to count")

    def test_what_was_included_comes_with_what_is_shown_alone(self) -> None:
        self.fill("vhv")
        doctors = [made(f"Practitioner/dr{number}") for number in range(3)]
        for number, resource in enumerate(self.stored):
            resource["performer"] = [to(f"Practitioner/dr{number}")]
        part = {**self.stored[0], "id": "part", "hasMember": [to("Observation/v0")]}
        sample = made("Specimen/s", subject=to(f"Patient/{ME}"))
        self.including(*doctors, observation("x", OTHER), part, sample)
        for path, token, expected in (("Observation?_count=1", self.narrow, ["v0", "dr0", "part"]),
                ("Observation", self.narrow, ["v0", "v2", "dr0", "dr2", "part"]),
                ("Observation", self.token, ["v0", "h1", "v2", "dr0", "dr1", "dr2", "part", "s"])):
            self.assertEqual(self.ids(path, token=token), expected)
        self.assertEqual(self.read("Observation")["total"], 3, "it tells nothing of whose was included")

    def test_what_a_match_names_is_included_however_it_names_it_and_nothing_else(self) -> None:
        form, included = "http://forms.example/q", [made("Practitioner/dr"), *(
            made(f"Questionnaire/q{number}", url="http://forms.example/q", version=f"{number}")
            for number in (1, 2))]
        for element, name, expected in (
                *(("performer", name, ["dr"]) for name in (
                    "Practitioner/dr", "Practitioner/dr/_history/2", "Practitioner\\/dr",
                    f"{self.behind.url}/Practitioner/dr")),
                ("questionnaire", form, ["q1", "q2"]), ("questionnaire", f"{form}|1", ["q1"]),
                ("questionnaire", f"{form}|3", []), ("questionnaire", f"{form}1", [])):
            self.fill("vh")
            self.stored[0][element] = "NAME" if element == "questionnaire" else [to("NAME")]
            self.stored[1]["questionnaire"] = f"{form}|2"
            self.including(*included)
            status, headers, body = cast(Any, self.behind.script["Observation"])
            self.behind.script["Observation"] = status, headers, body.replace(b"NAME", name.encode())
            self.assertEqual(self.ids("Observation", token=self.narrow), ["v0", *expected], name)

    def test_included_resources_cost_no_more_than_they_are_long(self) -> None:
        def seconds(count: int) -> float:
            self.fill("v" * count)
            for number, resource in enumerate(self.stored):
                resource["performer"] = [to(f"Practitioner/{number}")]
            self.including(*(made(f"Practitioner/{number}") for number in range(count)))
            page = cast(Any, self.behind.script["Observation"])[2]
            answer = s4s.Answer(200, {}, page, f"{self.behind.url}/Observation")
            request = s4s.Request("GET", f"/api/fhir/Observation?_count={count}", {
                "host": "localhost", "authorization": f"Bearer {self.narrow}"})
            with mock.patch.object(self.upstream, "ask", lambda *asked: answer):
                began = time.thread_time()
                self.assertEqual(s4s.dispatch(self.portal.portal, request).body.count(b"fullUrl"), 2 * count)
                return time.thread_time() - began
        self.assertLess(min(seconds(4000) for _ in range(2)), 20 * min(seconds(500) for _ in range(3)))

    def test_a_service_sees_what_can_be_told_of_nobody_and_a_clinician_gets_no_number_of_it(self) -> None:
        self.stored = [observation("v0"), observation("g0", subject=to("Group/g")), made("Group/g")]
        service, clinician = KeyedApp(self.portal).token().json, self.issue("user/*.rs", username="clinician")
        for path in ("Observation", "Group"):
            self.assertEqual(self.ids(path, token=service), ["v0", "g0", "g"])
        self.assertEqual(self.ids("Observation", token=clinician), ["v0"])
        for count in ("_summary=count", "_count=0", "_count=1", "_count=2", "_count=3"):
            self.assertNotIn("total", self.read(f"Observation?{count}", token=clinician), count)
        self.assertEqual(self.get("Group", token=clinician).status, 403)


# ######################################################################## 12 discovery

class Discovery(PortalTest):
    """The documents that say where everything is."""
    def documents(self) -> list[Any]:
        return [self.at(path, headers={"Accept": "text/html"}).json for path in (
            "/.well-known/oauth-authorization-server", "/.well-known/openid-configuration",
            "/api/fhir/.well-known/smart-configuration")]

    def test_all_documents_agree(self) -> None:
        oauth, openid, smart = self.documents()
        self.assertEqual(oauth, openid)
        for name, value in smart.items():
            if name not in ("capabilities", "grant_types_supported", "token_endpoint_auth_methods_supported"):
                self.assertEqual(oauth[name], value)
        self.assertLess(set(smart["grant_types_supported"]), set(oauth["grant_types_supported"]))
        self.assertEqual(smart["issuer"], self.portal.url)
        words = (r"launch-(ehr|standalone)|authorize-post|client-(public|confidential-a?symmetric)"
                 r"|sso-openid-connect|context-(banner|style)|context-(ehr|standalone)-(patient|encounter)"
                 r"|permission-(offline|patient|user|v1|v2)")  # those of SMART 2.2
        self.assertRegex(" ".join(smart["capabilities"]), f"^(({words})( |$))+$")

    def test_every_address_is_absolute_and_served_and_the_metadatas_are_among_them(self) -> None:
        named = {url for url in self.documents()[2].values() if isinstance(url, str)}
        for url in named:
            with self.subTest(url=url):
                self.assertTrue(url.startswith(self.portal.url))
                self.assertNotEqual(ask(url, method="OPTIONS").status, 404)
        extension = self.fhir("metadata").json["rest"][0]["security"]["extension"][0]["extension"]
        self.assertLessEqual({endpoint["valueUri"] for endpoint in extension}, named)

    def test_at_the_fhir_base_there_is_the_document_of_smart_and_no_other(self) -> None:
        for token in ("", "x", self.portal.issue_token()["access_token"]):
            for name, status in (("openid-configuration", 404), ("oauth-authorization-server", 404),
                                 ("smart-configuration", 200)):
                with self.subTest(name, token=token[:1]):
                    got = self.fhir(f".well-known/{name}", token)
                    self.assertEqual((got.status, got.headers["access-control-allow-origin"]), (status, "*"))

    def test_every_scope_listed_can_be_granted(self) -> None:
        for word in self.documents()[0]["scopes_supported"]:
            self.assertEqual(s4s.negotiate_scope(word, word, ("patient", "user", "system")), word)


# ######################################################################## 13 launch by a health record

class EhrLaunch(PortalTest):
    """Launch by the EHR: /launch and the test control."""
    scope = "launch openid fhirUser patient/*.rs offline_access"

    def setUp(self) -> None:
        super().setUp()
        set_signing_key(self.portal)
        for number in (1, 2):
            self.portal.load(made(f"Encounter/visit-{number}", status="finished", type=[{"text": "Check-up"}],
                subject=to(f"Patient/{DANIEL}"), period={"start": f"202{number}-01-01"}))
        self.app = App(self.portal, self.scope, launch_uris=["https://app.example/launch?own=1"])
        self.other = App(self.portal, self.scope)

    def launch(self, **given: Any) -> str:
        """Launch the app; gives what it asks then."""
        url = self.portal.launch(**{"client_id": self.app.client_id, "patient_id": DANIEL, **given})
        self.handle = query_of(url)["launch"]
        return self.app.authorize_url(launch=self.handle)

    def tokens(self, username: str = "daniel-adams", **changed: Any) -> Any:
        return self.app.exchange(self.app.code(username, launch=self.handle, **changed)).json

    def refused(self, app: App, **changed: str) -> None:
        got = ask(app.authorize_url(**{"launch": self.handle, **changed}))
        self.assertEqual(got.location.get("error"), "invalid_request")

    def test_the_app_is_opened_with_iss_and_launch_and_the_demo_app_where_this_server_is(self) -> None:
        iss, demo = self.portal.fhir_url, self.portal.url + "/demo"
        for client_id, there in ((self.app.client_id, "https://app.example/launch?own=1&"),
                                 ("demo-app", demo + "?")):
            got = self.post("/oauth/debug/launch", {"client_id": client_id}).json
            url = f"{there}iss={quote(iss, safe='')}&launch={got['launch']}"
            self.assertEqual(got, {"launch_url": url, "launch": got["launch"], "iss": iss})
        app = App(self.portal, "launch/patient", ("demo-app", ""), redirect_uris=[demo])
        self.assertIn("access_token", app.tokens())

    def test_the_context_is_in_token_response_refresh_and_introspection(self) -> None:
        self.launch()
        tokens = self.tokens()
        self.assertEqual((tokens["patient"], tokens["need_patient_banner"]), (DANIEL, True))
        self.assertEqual({"intent", "fhirContext", "encounter"} & tokens.keys(), set())
        role = {"role": "https://app.example/role"}
        context = [{"reference": "ImagingStudy/1"}, {"reference": "Task/1", "role": "launch"},
                   {"reference": "Patient/1", **role}, {"canonical": "https://app.example/form", **role}]
        self.launch(encounter_id="visit-1", intent="review", need_patient_banner=False, fhir_context=context)
        wanted = {"patient": DANIEL, "encounter": "visit-1", "intent": "review", "need_patient_banner": False,
                  "fhirContext": context}
        tokens = self.tokens()
        seen = introspected(self.app, tokens["access_token"])
        for answer in (tokens, self.app.refresh(tokens["refresh_token"]).json, seen):
            self.assertEqual({name: answer.get(name) for name in wanted}, wanted)

    def test_the_scope_launch_without_a_launch_stays_beside_launch_patient_or_is_dropped(self) -> None:
        tokens = self.app.tokens(scope="launch openid patient/*.rs")
        self.assertEqual((tokens["scope"], tokens["patient"]), ("openid patient/*.rs", DANIEL))
        self.assertEqual(ask(self.app.authorize_url(scope="launch")).location["error"], "invalid_request")
        either = "launch launch/patient patient/*.rs"
        self.assertEqual(App(self.portal, either).tokens()["scope"], either)

    def test_a_visit_that_the_launch_names_stays(self) -> None:
        scope = "launch launch/encounter patient/*.rs"
        self.app = App(self.portal, scope, launch_uris=["https://app.example/go"])
        self.launch(encounter_id="visit-1")
        self.assertEqual(self.tokens()["encounter"], "visit-1")
        self.launch(encounter_id="visit-1")
        with self.assertRaisesRegex(s4s.PortalError, "chosen already"):
            self.tokens(encounter_id="visit-2")

    def test_a_launch_is_for_its_app_by_its_handle_for_minutes_and_works_once(self) -> None:
        self.launch()
        self.portal.advance(301)
        self.refused(self.app)
        self.launch()
        self.refused(self.other)
        self.refused(self.app, launch="guess")
        self.assertIn("access_token", self.tokens())
        self.refused(self.app)
        url = self.launch()
        first, second = signed_in(self.portal, url), signed_in(self.portal, url)
        self.assertIn("code", first.submit("authorize").location)
        self.assertEqual(second.submit("authorize").status, 400)

    def test_without_an_app_it_is_for_the_first_that_uses_it_without_an_error(self) -> None:
        url = self.launch(client_id=None, launch_uri="https://app.example/start")
        self.refused(self.other, scope="launch nonsense", max_age="x")
        self.assertIn("/oauth/consent", ask(url).headers["location"])
        self.refused(self.other)
        self.assertIn("access_token", self.tokens())

    def test_a_launch_signs_nobody_in(self) -> None:
        browser = Browser(self.portal)
        self.assertIn('value="daniel-adams"', browser.open(self.launch(username="daniel-adams")).text)
        self.assertEqual(browser.sign_in("clinician").status, 403)
        url = self.launch(username="joseph-ross", patient_id=JOSEPH)
        self.assertIn('value="joseph-ross"', Browser(self.portal).open(url + "&login_hint=clinician").text)
        self.launch(username="daniel-adams")
        with self.assertRaisesRegex(s4s.PortalError, "daniel-adams"):
            self.tokens("clinician")
        self.assertEqual(signed_in(self.portal, self.launch(), "joseph-ross").page.status, 403)

    def test_the_launch_leaves_no_patient_to_choose(self) -> None:
        browser = signed_in(self.portal, self.launch(patient_id=AMY))
        self.assertIn("Amy Shaw", browser.page.text)
        self.assertEqual(self.app.exchange(browser.submit("authorize").location["code"]).json["patient"], AMY)
        self.launch()
        with self.assertRaises(s4s.PortalError):
            self.tokens(patient_id=AMY)
        self.launch(patient_id=None)  # without a patient, the user chooses
        self.assertEqual(self.tokens(patient_id=AMY)["patient"], AMY)

    def test_a_handle_that_is_sent_counts_whatever_the_scope(self) -> None:
        """fhirclient asks for launch only where no other word of the scope has it: launch/patient does."""
        scopes = "launch/patient patient/*.rs user/*.rs"
        self.app = App(self.portal, scopes, launch_uris=["https://app.example/"])
        for scope in ("launch/patient patient/*.rs", "patient/*.rs", "user/*.rs"):
            with self.subTest(scope):
                self.launch(patient_id=AMY, intent="review")
                self.refused(self.app, scope=scope, launch="bogus")
                self.refused(self.other, scope="patient/*.rs")
                tokens = self.tokens(scope=scope)
                told = [tokens[name] for name in ("patient", "intent", "scope")]
                self.assertEqual(told, [AMY, "review", scope])
                self.refused(self.app, scope=scope)

    def test_what_can_not_be_launched_is_named(self) -> None:
        nobody: Any = {"client_id": None}
        rows: Any = (
            ("client_id", {"client_id": "nobody"}, nobody), ("unknown", {"unknown": 1}),
            ("launch_uri", {"client_id": App(self.portal).client_id}, *({"launch_uri": bad} for bad in (
                "https://evil.example/", "//evil.example", "https://app.example/launch/../x", "/demo")),
             *({**nobody, "launch_uri": bad} for bad in ("javascript:alert(1)", "/relative"))),
            ("username", {"username": "x"}), ("intent", {"intent": 5}),
            ("patient_id", {"patient_id": "x"}, {"username": "joseph-ross"}, {"patient_id": []}),
            ("encounter_id", {"encounter_id": "x"}, {"patient_id": AMY, "encounter_id": "visit-1"}),
            ("need_patient_banner", {"need_patient_banner": "yes"}), ("fhir_context", *(
                {"fhir_context": bad} for bad in ({}, [{}], [{"canonical": 7}], [{"identifier": "x"}], *(
                    [{"reference": name, **more}] for name, more in (
                        ("x", {}), (7, {}), ("Patient/1", {}), ("Task/1", {"role": ""}),
                        ("Task/1", {"role": 7}), ("Task/1", {"type": 7})))))))
        for member, *tries in rows:
            for given in tries:
                with self.subTest(given=given):
                    asked = {"client_id": self.app.client_id, "patient_id": DANIEL, **given}
                    self.is_error(self.post("/oauth/debug/launch", asked), "invalid_request", words=member)

    def test_the_launch_page_finds_patients_by_name_and_opens_the_app(self) -> None:
        browser = Browser(self.portal)
        text = browser.open(f"{self.portal.url}/launch?name=amy&patient_id={DANIEL}").text
        self.assertEqual([whose in text for whose in (AMY, DANIEL, JOSEPH)], [True, True, False])
        page = browser.open(f"{self.portal.url}/launch?patient_id={DANIEL}")
        self.assertIn("2022-01-01 Check-up", page.text)
        got = browser.submit("launch", client_id=self.app.client_id, patient_id=DANIEL,
                             encounter_id="visit-2", intent="review")
        self.assertTrue(got.headers["location"].startswith("https://app.example/launch?own=1&iss="))
        self.handle = got.location["launch"]
        tokens = self.tokens()
        self.assertEqual((tokens["encounter"], tokens["intent"], tokens["need_patient_banner"]),
                         ("visit-2", "review", True))

    def test_with_a_mistake_the_launch_page_comes_back_as_it_was_filled_in(self) -> None:
        for field, wrong in (("launch_uri", {"launch_uri": ""}),
                             ("launch_uri", {"launch_uri": "ftp://x.example/"}),
                             ("encounter_id", {"client_id": "demo-app", "encounter_id": "visit-9"})):
            with self.subTest(wrong):
                browser = Browser(self.portal)
                fresh = browser.open(self.portal.url + "/launch").text
                for words in ('value="demo-app" selected', "must show whose record is open (need_pat"):
                    self.assertIn(words, fresh)
                filled = {"intent": "review", "patient_id": DANIEL, "username": "clinician", **wrong}
                got = browser.submit("launch", 0, "need_patient_banner", **filled)
                self.assertEqual(got.status, 400)
                for kept in ('name="intent" value="review"', f'<option value="{DANIEL}" selected>',
                             '<option value="clinician" selected>', *wrong.values()):
                    self.assertIn(kept, got.text)
                self.assertFalse(Page(got.text).all("input", name="need_patient_banner", checked=""))
                label = next(label for label in got.text.split("<label") if f'name="{field}"' in label)
                self.assertIn('role="alert"', label)

    def test_the_launch_page_offers_every_app_and_takes_the_address_of_one_that_registered_none(self) -> None:
        there = "http://localhost:3000/launch.html"
        with s4s.Server(client=f"mine={there}") as portal, s4s.Server(debug=False) as closed:
            browser, service, other = Browser(portal), KeyedApp(portal).client_id, App(portal).client_id
            apps: Any
            for apps in ({}, *({"client_id": name} for name in ("mine", "test-suite", other))):
                page = Page(browser.open(f"{portal.url}/launch?" + urlencode({"launch_uri": there})).text)
                self.assertTrue(page.all("input", value=there))
                for name, offered in ((service, False), *((name, True) for name in apps.values())):
                    self.assertEqual({"value": name} in page.all("option"), offered)  # services have no users
                url = browser.submit("launch", **apps).headers["location"]
                self.assertTrue(url.startswith(there + "?iss="))
            self.assertEqual(ask(closed.url + "/launch").status, 404)

    def test_an_app_that_was_launched_learns_how_the_pages_look(self) -> None:
        self.assertIn("context-style", self.fhir(".well-known/smart-configuration").text)
        self.launch()
        tokens = self.tokens()
        url, css = tokens["smart_style_url"], Page(self.at("/").text).texts["style"][0]
        self.assertTrue(url.startswith(self.portal.url + "/smart-style/"))
        seen = introspected(self.app, tokens["access_token"])
        for answer in (seen, self.app.refresh(tokens["refresh_token"]).json):
            self.assertEqual(answer["smart_style_url"], url)
        got = ask(url, headers={"Origin": "https://app.example"})
        self.assertEqual((got.status, got.headers["access-control-allow-origin"]), (200, "*"))
        self.assertEqual(list(got.json), [  # SMART, "Styling"
            "color_background", "color_error", "color_highlight", "color_modal_backdrop", "color_success",
            "color_text", "dim_border_radius", "dim_font_size", "dim_spacing_size", "font_family_body",
            "font_family_heading"])
        for name, value in got.json.items():
            self.assertIn(f"--{name}:{value};", css)
        digest = url.rpartition("/")[2]  # of what is there: other content, other address
        self.assertTrue(hashlib.sha256(got.body).hexdigest().startswith(digest) and len(digest) > 9)
        self.assertEqual(ask(url + "0").status, 404)
        self.assertNotIn("smart_style_url", self.app.tokens(scope="patient/*.rs"))

    def test_a_standalone_app_gets_the_visit_that_the_user_chose(self) -> None:
        app = App(self.portal, "launch/patient launch/encounter patient/*.rs")
        browser = signed_in(self.portal, app.authorize_url())
        self.assertIn('<option value="visit-1">2021-01-01 Check-up</option>', browser.submit(DANIEL).text)
        back = browser.submit("authorize", encounter_id="visit-1")
        self.assertEqual(app.exchange(back.location["code"]).json["encounter"], "visit-1")
        self.assertEqual(app.tokens()["encounter"], "visit-2", "without a choice, the newest")
        self.assertNotIn("encounter", app.tokens(username="joseph-ross"), "who was never here has none")
        for asking, scope, encounter in ((app, app.scope, "visit-9"), (self.app, "patient/*.rs", "visit-1")):
            with self.assertRaises(s4s.PortalError):
                asking.code(scope=scope, encounter_id=encounter)


# ######################################################################## 14 identity

def set_signing_key(portal: s4s.Server) -> None:
    """Spare a test the half second that making a key takes."""
    with portal.portal.state.transaction() as database:
        database.execute("DELETE FROM keys")
        database.execute("INSERT INTO keys VALUES (?, ?)", [f"{prime:x}" for prime in RFC_7515_KEY])


class Identity(PortalTest):
    """OpenID Connect: id_token, jwks, userinfo."""
    def setUp(self) -> None:
        super().setUp()
        set_signing_key(self.portal)
        self.app = App(self.portal, "openid fhirUser launch/patient patient/*.rs user/*.rs offline_access")

    def claims(self, tokens: Any) -> Any:
        """The claims of an id_token whose signature is good."""
        token = s4s.read_jwt(tokens["id_token"])
        keys = {key["kid"]: key for key in self.at("/oauth/jwks").json["keys"]}
        self.assertEqual(token.header["alg"], "RS256")
        self.assertTrue(s4s.rsa_verify(keys[token.header["kid"]], "RS256", token.signed, token.signature))
        return token.claims

    def test_the_id_token_says_who_signed_in_to_whom_and_when(self) -> None:
        now, tokens = int(self.portal.portal.clock.now()), self.app.tokens(nonce="n-0S6")
        claims, hashed = self.claims(tokens), hashlib.sha256(tokens["access_token"].encode()).digest()
        self.assertEqual({name: claims[name] for name in claims.keys() - {"iat", "exp", "auth_time"}}, {
            "iss": self.portal.url, "aud": self.app.client_id, "sub": "daniel-adams", "nonce": "n-0S6",
            "fhirUser": f"{self.portal.fhir_url}/Patient/{DANIEL}", "at_hash": b64(hashed[:16])})
        for name in ("iat", "auth_time"):
            self.assertAlmostEqual(claims[name], now, delta=5)
        self.assertEqual(claims["exp"] - claims["iat"], 3600)
        self.assertNotIn("nonce", self.claims(self.app.tokens()))
        # auth_time is when the user signed in, not when they approved.
        browser = signed_in(self.portal, self.app.authorize_url())
        self.portal.advance(500)
        browser.submit(DANIEL)
        claims = self.claims(self.app.exchange(browser.submit("authorize").location["code"]).json)
        self.assertAlmostEqual(claims["auth_time"], now, delta=10)

    def test_who_acts_for_another_is_not_the_patient(self) -> None:
        for username, patient_id, who in (("daniel-adams", AMY, "RelatedPerson/daniel-adams-amy-shaw"),
                ("clinician", JOSEPH, "Practitioner/smart-clinician")):
            claims = self.claims(self.app.tokens(username=username, patient_id=patient_id))
            self.assertEqual(claims["fhirUser"], f"{self.portal.fhir_url}/{who}")
        self.assertNotIn("patient", self.app.tokens(username="clinician", scope="openid user/*.rs"))
        self.assertEqual(self.app.tokens(scope="openid user/*.rs")["patient"], DANIEL)

    def test_without_openid_there_is_no_id_token_and_without_fhir_user_no_claim(self) -> None:
        self.assertNotIn("id_token", self.app.tokens(scope="fhirUser patient/*.rs"))
        self.assertNotIn("fhirUser", self.claims(self.app.tokens(scope="openid patient/*.rs")))

    def test_the_scope_profile_gives_the_claim_relative_as_the_apps_of_smart_1_take_it_apart(self) -> None:
        for scope, patient_id, who in (
                ("openid profile", DANIEL, f"Patient/{DANIEL}"), ("openid fhirUser", DANIEL, None),
                ("openid profile", AMY, "RelatedPerson/daniel-adams-amy-shaw")):
            tokens = self.app.tokens(scope=scope + " patient/*.rs", patient_id=patient_id)
            told = self.at("/oauth/userinfo", token=tokens).json
            for claims in (self.claims(tokens), told, introspected(self.app, tokens["access_token"])):
                with self.subTest(scope, who=who):
                    self.assertEqual(claims.get("profile"), who)
                    self.assertIn("fhirUser", claims)

    def test_jwks_has_public_members_only(self) -> None:
        key, = self.at("/oauth/jwks").json["keys"]
        self.assertEqual(set(key), {"kty", "n", "e", "kid", "use", "alg"})
        self.assertEqual(key["kid"], b64(hashlib.sha256(key["n"].encode()).digest()))

    def test_the_key_is_made_once_and_kept_with_the_state(self) -> None:
        path = os.path.join(self.during(tempfile.TemporaryDirectory()), "state.db")
        with s4s.Server(db=path) as portal:
            keys = at_once(3, lambda: ask(portal.url + "/oauth/jwks").json)
            portal.reset()
            keys.append(ask(portal.url + "/oauth/jwks").json)
        with s4s.Server(db=path) as portal:
            keys.append(ask(portal.url + "/oauth/jwks").json)
        self.assertEqual(keys, keys[:1] * 5)
        self.assertNotEqual(keys[0], self.at("/oauth/jwks").json)

    def test_userinfo_and_introspection_say_what_the_id_token_says(self) -> None:
        tokens = self.app.tokens(patient_id=AMY)
        claims, seen = self.claims(tokens), introspected(self.app, tokens["access_token"])
        for name in ("iss", "sub", "fhirUser"):
            self.assertEqual(seen[name], claims[name])
        told = {"sub": claims["sub"], "fhirUser": claims["fhirUser"], "name": "Daniel Adams"}
        access, form = tokens["access_token"], {"access_token": tokens["access_token"]}
        for how in ({"token": access}, {"token": access, "method": "POST"}, {"form": form},
                    {"token": access, "form": {}}):  # RFC 6750 sections 2.1 and 2.2
            self.assertEqual(self.at("/oauth/userinfo", **how).json, told)
        for scope, named in (("openid patient/*.rs", False), ("openid profile", True)):
            got = self.at("/oauth/userinfo", token=self.portal.issue_token(scope=scope))
            self.assertEqual("name" in got.json, named)

    def test_what_the_fixtures_say_of_a_user_is_told_with_email_and_profile(self) -> None:
        ours = re.findall(r"\w+", """active scope client_id username token_type exp iat nbf sub aud iss jti
            nonce auth_time acr amr azp at_hash c_hash fhirUser profile patient encounter intent
            need_patient_banner smart_style_url fhirContext""")
        user = {"username": "maria", "password": "s", "email": "m@x.example",
                "patients": [{"patient_id": AMY}], "claims": {
                    "email_verified": True, "locale": "pt", "name": "Maria", **dict.fromkeys(ours, "stolen")}}
        mails, more = {"email": "m@x.example", "email_verified": True}, {"locale": "pt", "name": "Maria"}
        with s4s.Server(fixtures={"users": [user]}) as portal:
            set_signing_key(portal)
            app = App(portal, "openid email profile launch/patient patient/*.rs")
            for scope, told, hidden in (("openid email", mails, more), ("openid profile", more, mails),
                                        ("openid", {}, {**mails, **more})):
                with self.subTest(scope):
                    tokens = app.tokens("maria", scope=scope + " patient/*.rs")
                    id_token = s4s.read_jwt(tokens["id_token"]).claims
                    for claims in (ask(portal.url + "/oauth/userinfo", token=tokens).json, id_token,
                                   introspected(app, tokens["access_token"])):
                        self.assertEqual({**claims, **told, "sub": "maria"}, claims)
                        self.assertNotIn("stolen", claims.values())
                        self.assertEqual(claims.keys() & hidden.keys(), set())
                    self.assertEqual(id_token["aud"], app.client_id)

    def test_userinfo_needs_a_token_with_openid(self) -> None:
        tokens = self.app.tokens()
        narrowed = self.app.refresh(tokens["refresh_token"], scope="patient/*.rs").json
        without = self.portal.issue_token(scope="patient/*.rs")
        form = {"access_token": tokens["access_token"]}
        for why, how, status, header in (("no openid", {"token": without}, 403, 'error="insufficient_scope"'),
                ("narrowed", {"token": narrowed}, 403, 'error="insufficient_scope"'),
                ("no access token", {"token": tokens["refresh_token"]}, 401, "invalid_token"),
                ("two ways at once", {"token": tokens, "form": form}, 400, "invalid_request"),
                ("twice", {"form": [*form.items(), *form.items()]}, 400, "^$"),
                ("a bad one", {"form": {"access_token": "x"}}, 401, "invalid_token"),
                ("in a GET's body (2.2)", {"method": "GET", "form": form}, 401, '^Bearer realm="s4s"$'),
                ("none", {"form": {"token": "x"}}, 401, '^Bearer realm="s4s"$')):  # no error code (3.1)
            with self.subTest(why):  # RFC 6750 section 2: a client must not use more than one method
                got = self.at("/oauth/userinfo", **how)
                self.assertEqual(got.status, status)
                self.assertRegex(got.headers.get("www-authenticate", ""), header)


# ######################################################################## 15 keys, and backend services

def with_service(**keys: Any) -> dict[str, Any]:
    """Fixtures with a backend service whose keys are these."""
    service = {"client_id": "service", "grant_types": ["client_credentials"], "scope": "system/*.rs", **keys}
    return {"clients": [service]}


class Assertions(PortalTest):
    """private_key_jwt: RFC 7523, and SMART's rules for it."""
    def setUp(self) -> None:
        super().setUp()
        self.app = KeyedApp(self.portal)

    def test_what_proves_who_it_is(self) -> None:
        url = self.portal.url
        for algorithm, aud in (("RS384", url + "/oauth/token"), ("ES384", url + "/oauth/token"),
                ("RS384", url), ("RS384", url + "/"), ("RS384", [url + "/oauth/token"]),
                ("RS384", ["https://else.example", 5, url]),
                ("RS384", f"http://localhost:{self.portal.port}/oauth/token")):
            self.assertEqual(self.app.token(self.app.assertion(algorithm, aud=aud)).status, 200, aud)
        for path, aud, status in (("revoke", "revoke", 200), ("introspect", "introspect", 200),
                                  ("revoke", "token", 200), ("revoke", "introspect", 401),
                                  ("introspect", "revoke", 401)):
            # The endpoint called is meant too; another is not.
            got = self.app.token(self.app.assertion(aud=f"{url}/oauth/{aud}"), path=path, token="x")
            self.assertEqual(got.status, status, (path, aud))

    def test_each_rule_is_enforced(self) -> None:
        now, other = self.portal.portal.clock.now(), App(self.portal).client_id
        headers: dict[str, list[Any]] = {"alg": ["none", "HS256", "RS256", "ES384", ["RS384"], "RS"],
            "typ": ["at+jwt", ["JWT"]], "kid": [None, 1, ["r"], "else", "e"], "crit": [["b64"], [], ["exp"]],
            "jku": ["https://app.example/jwks", ["x"], {}]}
        claims: list[dict[str, Any]] = [{"iss": "nobody", "sub": "nobody"}, {"iss": "nobody"}, {"iss": None},
            {"iss": ["x"]}, {"sub": "nobody"}, {"sub": [self.app.client_id]}, {"iss": other, "sub": other}]
        values: dict[str, list[Any]] = {"aud": ["https://else.example", None, {}, 5, [[self.portal.url]]],
            "exp": [None, now - 1, "soon", True, now + 400, 1e300, [now]], "nbf": [True, -1, now + 60, {}],
            "iat": [now + 60, "x", []], "jti": [None, "", 5, ["x"]]}
        claims += [{name: value} for name in values for value in values[name]]
        for header, changed in (*(({name: value}, {}) for name in headers for value in headers[name]),
                                *(({}, changed) for changed in claims)):
            with self.subTest(header=header, claims=changed):
                got = self.app.token(self.app.assertion(header=header, **changed))
                self.is_error(got, "invalid_client", 401)

    def test_another_keys_signature_is_refused_and_one_by_an_algorithm_not_registered(self) -> None:
        head, claims, signature = self.app.assertion().split(".")
        changed = b64(base64.urlsafe_b64decode(claims + "==") + b" ")
        for bent in (f"{head}.{claims}.{signature[:-6]}AAAAAA", f"{head}.{claims}.", f"{head}.{claims}", "x",
                     f"{head}.{changed}.{signature}"):
            self.is_error(self.app.token(bent), "invalid_client", 401)
        app = KeyedApp(self.portal, token_endpoint_auth_signing_alg="ES384")
        self.assertEqual(app.token(app.assertion("ES384")).status, 200)
        self.assertIn("alg is 'RS384'", app.token(app.assertion("RS384")).json["error_description"])

    def test_a_key_is_chosen_by_its_kind_and_use_too(self) -> None:
        for keys, status in (
                ([RSA_JWK, {**RFC_6979_JWK, "kid": "r"}], 200), ([{**RSA_JWK, "use": "enc"}], 401),
                ([{**RSA_JWK, "alg": "RS256"}], 401), ([{**RSA_JWK, "use": "sig", "alg": "RS384"}], 200)):
            self.assertEqual(KeyedApp(self.portal, jwks={"keys": keys}).token().status, status, keys)

    def test_the_audience_is_a_base_url_whatever_host_was_asked(self) -> None:
        with s4s.Server(base_url="https://portal.example") as portal:
            app = KeyedApp(portal)
            for aud, status in (("https://portal.example/oauth/token", 200), (portal.address, 401)):
                self.assertEqual(app.token(app.assertion(aud=aud)).status, status, aud)

    def test_of_many_requests_with_one_assertion_one_is_first(self) -> None:
        assertion = self.app.assertion()
        self.assertEqual(sorted(at_once(8, lambda: self.app.token(assertion).status)), [200] + [401] * 7)
        self.is_error(self.app.token(assertion), "invalid_client", 401)

    def test_a_forged_assertion_uses_up_no_jti_and_an_expired_one_frees_it(self) -> None:
        self.is_error(self.app.token(self.app.assertion(jti="one")[:-6] + "AAAAAA"), "invalid_client", 401)
        for seconds in (0, 301):
            self.portal.advance(seconds)
            self.assertEqual(self.app.token(self.app.assertion(jti="one")).status, 200)

    def test_what_is_sent_beside_the_assertion(self) -> None:
        saml = "urn:ietf:params:oauth:client-assertion-type:saml2-bearer"
        for why, changed, expected in (
                ("the type must be named exactly", {"client_assertion_type": saml}, (401, "invalid_client")),
                ("its own client_id", {"client_id": self.app.client_id}, (200, None)),
                ("another client_id", {"client_id": "test-suite"}, (401, "invalid_client")),
                ("two ways at once", {"client_secret": "x"}, (400, "invalid_request"))):
            got = self.app.token(**changed)
            self.assertEqual((got.status, got.json.get("error")), expected, why)

    def test_an_app_with_users_may_prove_itself_so_too(self) -> None:
        app = KeyedApp(self.portal, grant_types=["authorization_code", "refresh_token"],
                       scope="launch/patient patient/*.rs", redirect_uris=[App.redirect_uri])
        flow = App(self.portal, known=(app.client_id, ""))
        got = app.token(grant_type="authorization_code", code=flow.code(), scope="",
                        redirect_uri=flow.redirect_uri, code_verifier=flow.verifier)
        self.assertEqual((got.status, got.json["patient"]), (200, DANIEL))


class KeysByUrl(PortalTest):
    """jwks_uri: fetched, kept as long as allowed, with limits."""
    def setUp(self) -> None:
        super().setUp()
        there = FhirServer()
        self.addCleanup(there.stop)
        self.url, self.asked, self.script = there.url + "?a=b", there.seen, there.script
        self.answer({"keys": [RSA_JWK]})

    def answer(self, keys: Any, status: int = 200, headers: Any = None) -> None:
        self.script["/fhir?a=b"] = json_answer(keys, status, **(headers or {}))

    def app(self, portal: s4s.Server | None = None) -> KeyedApp:
        return KeyedApp(portal or self.portal, jwks_uri=self.url)

    def test_keys_are_kept_as_long_as_cache_control_says_and_a_day_at_most(self) -> None:
        for control, seconds, expected in (("", 0, 2), ("public, max-age=60", 0, 1), ("max-age=60", 59, 1),
                ("max-age=60", 61, 2), ("no-store, max-age=60", 0, 2), ("no-cache, max-age=60", 0, 2),
                ("max-age=999999999", 86401, 2)):
            with self.subTest(control, seconds=seconds):
                self.portal.reset()
                self.asked.clear()
                self.answer({"keys": [RSA_JWK]}, headers={"Cache-Control": control})
                app = self.app()
                self.assertEqual(app.token().status, 200)
                self.portal.advance(seconds)
                self.assertEqual((app.token().status, len(self.asked)), (200, expected))

    def test_a_bounded_number_is_kept_and_each_for_the_client_that_names_it(self) -> None:
        self.answer({"keys": [RSA_JWK]}, headers={"Cache-Control": "max-age=600"})
        with mock.patch.object(s4s, "MAX_KEY_SETS", 3):
            for number in range(1, 10):
                self.assertEqual(self.app().token().status, 200)
                self.assertEqual(len(self.asked), number)
                self.assertLess(len(self.portal.portal.key_sets), 5)

    def test_a_key_that_is_not_among_those_kept_is_looked_for_again(self) -> None:
        app = self.app()
        self.answer({"keys": [RFC_6979_JWK]}, headers={"Cache-Control": "max-age=600"})
        self.assertEqual(app.token(app.assertion("ES384")).status, 200)
        self.answer({"keys": [RSA_JWK]})
        self.assertEqual(app.token().status, 200)

    def test_a_key_with_members_of_wrong_types_is_none(self) -> None:
        for name, value in (("n", {}), ("kty", ["RSA"]), ("kid", ["r"]), ("use", []), ("alg", {})):
            self.answer({"keys": [{**RSA_JWK, name: value}]})
            self.is_error(self.app().token(), "invalid_client", 401)

    def test_why_keys_did_not_come_is_told_to_nobody_but_the_log(self) -> None:
        here, told, lines, key = self.url, set(), log_of(self.portal), {"kty": "oct", "kid": "r", "k": "x"}
        keys: tuple[Any, ...] = ({}, [["kid"]], [{"kty": "RSA", "kid": ["r"]}, 5])
        for url, status, body, cause in (
                ("http://127.0.0.1:1/", 200, b"", "refused"), ("http://x.invalid/", 200, b"", "gaierror"),
                (here, 404, {"keys": [RSA_JWK]}, "404"), (here, 302, b"", "302"), (here, 200, b"{", "short"),
                (here, 200, b"<html>", "JSON"), (here, 200, 7, "JSON object"), (here, 200, [], "JSON object"),
                (here, 200, b" " * (65 << 10), "65536"), (here, 200, b"[" * 5000, ""),
                *((here, 200, {"keys": wrong}, "array of objects") for wrong in keys),
                (here, 200, {"keys": [RSA_JWK, RSA_JWK]}, "same kty and kid"),
                (here, 200, {"keys": [key]}, "private member")):
            with self.subTest(url=url, body=str(body)[:20]):
                short = {"Content-Length": "999"} if body == b"{" else {}
                self.answer(body, status, {"Location": self.url, **short})
                app, lines[:] = KeyedApp(self.portal, jwks_uri=url), []
                got = app.token()
                self.is_error(got, "invalid_client", 401)
                told.add(got.json["error_description"])
                warning, = [line for line in lines if "jwks_uri" in line]
                for words in (cause, app.client_id, url.split("/")[2]):
                    self.assertIn(words, warning)
        self.assertEqual(len(told), 1, told)
        token = self.portal.issue_token()["access_token"]
        KeyedApp(self.portal, jwks_uri=f"http://{token}.invalid/").token()
        self.assertNotIn(token, str(lines))

    def test_another_sites_page_makes_this_server_fetch_nothing(self) -> None:
        for settings in ({}, {"debug": False}, {"host": "0.0.0.0", "base_url": "http://portal.example"}):
            with s4s.Server(fixtures=with_service(jwks_uri=self.url), **settings) as portal:
                own, known = self.app(portal), KeyedApp(portal, "service")
                self.asked.clear()
                rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
                for app, path in ((own, "token"), (known, "token"), (known, "introspect"), (own, "revoke")):
                    for headers in (*from_elsewhere(portal.address), rebound):
                        got = app.token(headers=headers, path=path, token="x")
                        self.assertIn(got.status, (401, 421), (settings, headers, path))
                self.assertEqual(self.asked, [])
                for headers in from_here(portal.address):
                    self.assertEqual(known.token(headers=headers).status, 200)

    def test_while_debug_controls_are_off_a_stranger_gets_nothing_and_nobody_is_asked(self) -> None:
        for keys, error in (({"jwks_uri": self.url}, "invalid_client"),
                            ({"jwks": {"keys": [RSA_JWK]}}, "unauthorized_client")):
            with self.subTest(keys=keys), s4s.Server(debug=False, fixtures=with_service(**keys)) as portal:
                app, portal.portal.log = KeyedApp(portal, **keys), mock.Mock()
                self.answer({"keys": [RSA_JWK]}, headers={"Cache-Control": "max-age=60"})
                self.asked.clear()
                self.assertEqual((app.token().json["error"], self.asked), (error, []))
                itself, app.client_id = app.client_id, "service"
                self.assertEqual(app.token().status, 200)
                app.client_id = itself
                self.assertEqual(app.token().json["error"], error, "what another's fetch brought is not its")

    def test_a_fetch_that_drips_is_cut_off(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as quiet, self.assertRaises(s4s.BadRequest):
            url = f"http://127.0.0.1:{quiet.getsockname()[1]}/"
            s4s.fetch(url, False, self.portal.portal.sockets, seconds=0.05)


class BackendServices(PortalTest):
    """client_credentials (SMART, "Backend Services")."""
    def reset_half(self, portal: s4s.Server) -> None:
        """A reset but for the records, which come last."""
        records = mock.patch.object(portal.portal.records, "reset", side_effect=KeyError)
        with records, self.assertRaises(KeyError):
            portal.reset()

    def test_what_a_request_relied_on_before_a_reset_gives_no_token_and_no_session_after_it(self) -> None:
        for settings in ({}, {"fhir_server": "http://127.0.0.1:1/fhir"}):
            with s4s.Server(**settings) as portal:
                state, service, browser = portal.portal.state, KeyedApp(portal), Browser(portal)
                browser.open(portal.url + "/login")
                for name, act, status in (("spend_assertion", service.token, 401),
                                          ("hash_password", browser.sign_in, 400)):
                    meanwhile = functools.partial(self.reset_half, portal)
                    with self.subTest(name, **settings), doing(s4s, name, after=meanwhile):
                        self.assertEqual(act().status, status)
                for table in ("tokens", "grants", "sessions"):
                    self.assertEqual(state.rows(f"SELECT * FROM {table}"), [], table)

    def test_a_token_lasts_five_minutes_has_no_refresh_token_and_stands_for_no_user(self) -> None:
        got = KeyedApp(self.portal).token().json
        self.assertEqual((got["expires_in"], got["scope"], got["token_type"]), (300, "system/*.rs", "Bearer"))
        self.assertEqual({"refresh_token", "patient", "id_token"} & got.keys(), set())
        self.is_error(self.at("/oauth/userinfo", token=got), "insufficient_scope", 403)

    def test_only_system_scopes_within_the_registered_are_granted(self) -> None:
        app = KeyedApp(self.portal, scope="system/Observation.rs patient/*.rs openid")
        asked = "system/Observation.read system/*.rs patient/*.rs openid"
        self.assertEqual(app.token(scope=asked).json["scope"], "system/Observation.read")
        for scope in ("system/*.rs", "patient/*.rs", "openid", "nonsense"):
            self.assertEqual(app.token(scope=scope).json["error"], "invalid_scope")
        self.assertEqual(app.token(scope="").json["error"], "invalid_request")

    def test_a_client_with_a_secret_or_none_or_that_did_not_register_for_it_may_not(self) -> None:
        for method in ("client_secret_basic", "none"):
            app = App(self.portal, "system/*.rs", grant_types=["client_credentials"],
                      token_endpoint_auth_method=method)
            got = app.token_request(grant_type="client_credentials", scope="system/*.rs")
            self.is_error(got, "unauthorized_client")
        other = KeyedApp(self.portal, grant_types=["authorization_code"], redirect_uris=[App.redirect_uri])
        self.assertEqual(other.token().json["error"], "unauthorized_client")

    def test_another_sites_page_may_register_with_its_own_key_and_reads_nothing_by_it(self) -> None:
        metadata = {"redirect_uris": ["https://app.example/cb"]}
        for base_url in ([], ["https://portal.example"]):
            with s4s.Server(base_url=base_url, fixtures=with_service(jwks={"keys": [RSA_JWK]})) as portal:
                # The key of one is known to those that run the server, and their pages.
                own, known = KeyedApp(portal), KeyedApp(portal, "service")
                for headers in from_elsewhere(portal.address):
                    with self.subTest(base_url=base_url, headers=headers):
                        self.is_error(own.token(headers=headers), "unauthorized_client", words="another site")
                        self.assertEqual(known.token(headers=headers).status, 200)
                        got = ask(portal.address + "/oauth/register", headers=headers, data=metadata)
                        self.assertEqual((got.status, got.headers["access-control-allow-origin"]), (201, "*"))
                behind_tls = [{"Origin": url} for url in base_url]  # the proxy speaks http to this server
                for headers in (*from_here(portal.address), *behind_tls):
                    self.assertEqual(own.token(headers=headers).status, 200, headers)

    def test_its_token_may_introspect_every_token(self) -> None:
        service, other = KeyedApp(self.portal).token().json, self.portal.issue_token()
        for given in (service, other):
            got = self.at("/oauth/introspect", form={"token": given["access_token"]}, token=service).json
            self.assertTrue(got["active"] and not (given is service and "sub" in got), got)


# ######################################################################## 17 search

class RecordsTest(RecordTest):
    """Tests of the embedded records, mostly as /api/open-fhir/ shows them."""
    scope, api = "", "/api/open-fhir/"

    def resources(self, path: str, **how: Any) -> list[dict[str, Any]]:
        """A search's matches, all on one page."""
        return within(self.read(path + ("&" if "?" in path else "?") + "_count=1000", **how), "match")

    def ids(self, path: str, **how: Any) -> list[str]:
        return [resource["id"] for resource in self.resources(path, **how)]

    def finds(self, *expected: tuple[str, list[str]]) -> None:
        for path, ids in expected:
            self.assertEqual(self.ids(path), ids, path)

    def types(self, path: str, token: Any, mode: str = "") -> set[str]:
        return {resource["resourceType"] for resource in within(self.fhir(path, token).json, mode)}


class Dates(unittest.TestCase):
    """FHIR's dates, and how searches compare them."""
    def test_a_partial_date_is_all_that_it_may_mean(self) -> None:
        day = 86400
        for text, start, length in (("1970", 0, 365 * day), ("1972-02", 761 * day, 29 * day),
                ("1970-01-02", day, day), ("1970-01-01T00:01", 60, 60), ("1970-01-01T00:00:01Z", 1, 1),
                ("1970-01-01T00:00:00.25Z", 0.25, 0.01), ("1970-01-01T02:00:00+02:00", 0, 1),
                ("1969-12-31T19:00:00-05:00", 0, 1)):
            with self.subTest(text=text):
                first, last = s4s.date_range(text)
                self.assertEqual((first, round(last - first, 6)), (start, length))

    def test_what_is_no_date_is_refused(self) -> None:
        for text in ("", "19", "2008-13", "2008-02-30", "2008-1-1", "2008-07-10T25:00", "2008-07-10T12:61:00",
                     "0000", "2008-07-10T12", "yesterday", "2008-07-10 12:00"):
            with self.subTest(text=text), self.assertRaises(ValueError):
                s4s.date_range(text)

    def test_prefixes_compare_spans(self) -> None:
        condition = made("Condition", onsetDateTime="2008-07")
        period = made("Condition", onsetPeriod={"start": "2008-07-10"})
        for values, *expected in (("2008 2008-07 lt2008-07-10 le2008-07 eb2008-08", True, False),
                ("eq2008-07-10 lt2008-07 le2008-06 eb2008-07-31", False, False),
                ("ne2008 gt2008-07 gt2008-08 ge2008-08 sa2008-07-01 ap2009", False, True),
                ("gt2008-07-10 ge2008-07 sa2008-06 ap2008-07-15", True, True)):
            for value in values.split():
                with self.subTest(value=value):
                    self.assertEqual([s4s.resource_matches(resource, "r4", [("onset-date", value)])
                                      for resource in (condition, period)], expected)


class Searching(RecordsTest):
    """FHIR search over the embedded records."""
    def test_tokens_are_given_with_and_without_their_system(self) -> None:
        for value, count in (("1975-2", 1), ("http://loinc.org|1975-2", 1), ("|1975-2", 0),
                             ("http://snomed.info/sct|1975-2", 0), ("1975-2,2345-7", 2), ("x\\,1975-2", 0)):
            with self.subTest(value=value):
                matches = self.resources("Observation?" + urlencode({"code": value}))
                self.assertEqual(len({match["code"]["coding"][0]["code"] for match in matches}), count)
        self.portal.load(made("Patient/odd", identifier=[{"value": "a\\,b|c"}]))
        self.finds(("Patient?" + urlencode({"identifier": "a\\\\\\,b\\|c"}), ["odd"]),
                   ("Patient?identifier=http://hospital.smarthealthit.org%7C", [AMY, JOSEPH, DANIEL]),
                   ("Patient?gender=|female", [AMY]))

    def test_references_are_given_as_id_relative_or_absolute(self) -> None:
        base, visits = self.portal.open_fhir_url, self.ids(f"Encounter?patient={DANIEL}")
        by_doctor = self.ids("Encounter?participant=Practitioner/smart-clinician")
        self.assertTrue(visits and by_doctor)
        for expected, *queries in (
                (visits, f"patient=Patient/{DANIEL}", f"subject={DANIEL}", f"subject:Patient={DANIEL}",
                 f"subject={base}/Patient/{DANIEL}"),
                (by_doctor, "participant=smart-clinician", "participant:Practitioner=smart-clinician",
                 f"participant={base}/Practitioner/smart-clinician"),
                ([], "participant=Patient/smart-clinician", "participant:Patient=smart-clinician",
                 "subject=Group/1", "participant=https://elsewhere.example/Practitioner/smart-clinician")):
            self.finds(*((f"Encounter?{query}", expected) for query in queries))

    def test_every_type_that_says_whose_it_is_is_served(self) -> None:
        named = {"Appointment", "Communication", "Composition", "Flag", "List", "Provenance", "EpisodeOfCare"}
        for version, more in (("dstu2", "Order"), ("stu3", "Task"), ("r4", "Consent")):
            served = s4s.search_table(version)
            self.assertEqual({*named, more} - served.keys(), set(), version)
            first = {"dstu2": {*served}, "stu3": {"ImagingStudy", "MeasureReport"}}.get(version, set())
            with s4s.Server(fhir_version=version) as portal:
                token = portal.issue_token(scope="patient/*.rs")["access_token"]
                for name in sorted(served.keys() - {*s4s.SHARED_TYPES, "Binary", "Patient", "Provenance"}):
                    element = s4s.OWNER_ELEMENTS[name][0 if name in first else -1]
                    for key, patient in (("mine", DANIEL), ("theirs", AMY)):
                        whose: Any = to(f"Patient/{patient}")
                        whose = [{"actor": whose}] if name == "Appointment" else whose
                        portal.load({"resourceType": name, "id": key, element: whose})
                    own = next(word for word in served[name] if served[name][word].kind == "owner")
                    for path, seen in ((f"{name}/mine", True), (f"{name}/theirs", False),
                                       (f"{name}?{own}={DANIEL}&_count=1000", True)):
                        with self.subTest(version=version, path=path):
                            got = ask(f"{portal.fhir_url}/{path}", token=token)
                            self.assertEqual((got.status == 200, '"mine"' in got.text), (seen, seen))
                            self.assertNotIn('"theirs"', got.text)

    _ME, _VISIT, _ILL, _END = map(to, (f"Patient/{ME}", "Encounter/e", "Condition/c", "Endpoint/e"))
    _CODE, _PERIOD = {"coding": [{"code": "c"}]}, {"start": "2026"}
    _BOUNDS, _DAYS = ({"repeat": {"boundsPeriod": {"start": "2020-01-10", "end": "2020-02"}}},
                      {"event": ["2020-01-12", "2020-01-10"]})
    _FOUND = "date=ge2020-01-01 date=sa2020-01-09 date=ap2020-01-11 date:missing=false"
    _LOST = "date=2020-01-10 date=lt2020-01-10 date=sa2020-01-10 date:missing=true"
    # Versions, type and content of a resource, the searches that find it, those that don't.
    of_registries: ClassVar[tuple[Any, ...]] = (
        ("r4", "Appointment", {"start": "2026-01-02T10:00Z", "participant": [{"actor": _ME, "status": "c"}]},
         f"date=2026-01-02 part-status=c patient={ME}"),
        ("r4", "Task", {"for": _ME, "authoredOn": "2026", "focus": _ILL, "owner": _END},
         f"patient={ME} subject={ME} owner=e authored-on=2026 focus:Condition=c"),
        ("r4", "Consent", {"dateTime": "2026", "provision": {"period": _PERIOD}}, "date=2026 period=gt2027"),
        ("stu3", "Consent", {"period": _PERIOD}, "period=gt2027"),
        ("stu3", "Communication", {"context": _VISIT, "sent": "2026"}, "encounter=e context=e sent=2026"),
        ("stu3", "CarePlan", {"context": _VISIT}, "context=e encounter=e", "context=w encounter=w"),
        ("dstu2", "List", {"entry": [{"item": _ILL}], "title": "x"}, "item=Condition/c title=x"),
        ("dstu2", "Composition", {"class": _CODE, "section": [{"entry": [_ILL]}]}, "class=c entry=c"),
        ("dstu2", "Patient", {"deceasedDateTime": "2026"}, "deathdate=2026 deceased=true", "deceased=false"),
        ("r4", "Patient", {"deceasedDateTime": "2026", "address": [{"country": "PT"}], "telecom": [
            {"system": name, "value": name} for name in ("phone", "email")]},
         "death-date=2026 deceased=true deceased:not=false phone=phone email=email address-country=pt",
         "deceased=false phone=email"),
        ("r4", "Patient", {"deceasedBoolean": True}, "deceased=true deceased:not=false", "deceased=false"),
        ("r4", "CareTeam", {"participant": [{"role": [_CODE]}]}, "role=c"),
        ("r4", "PractitionerRole", {"endpoint": [_END]}, "endpoint=e endpoint:Endpoint=e"),
        ("r4", "QuestionnaireResponse", {"questionnaire": "http://q.example/q|1"},
         "questionnaire=http://q.example/q questionnaire=http://q.example/q%7C1",
         "questionnaire=http://q.example/q%7C2 questionnaire=q"),
        ("stu3", "QuestionnaireResponse", {"questionnaire": _END}, "questionnaire=e"),
        ("dstu2", "Questionnaire", {"status": "draft", "version": "Beta", "group": {
            "title": "Pain", "concept": [{"code": "c"}]}}, "status=draft title=pain code=c version=be"),
        ("stu3 r4", "Questionnaire", {
            "url": "http://q.example/q", "name": "Q", "title": "Pain", "date": "2026", "status": "c",
            "version": "1", "identifier": [{"value": "i"}]},
         "url=http://q.example/q name=q title=pain status=c version=1 identifier=i date=2026", "url=http://q"),
        ("dstu2", "CarePlan", {"status": "c", "period": _PERIOD, "category": [_CODE]},  # Argonaut
         "category=c&status=c&date=ge2026", "category=c&status=x"),
        ("dstu2", "Goal", {"targetDate": "2026-02"}, "targetdate=2026-02"),
        ("r4", "Goal", {"description": _CODE}, "description=c"),  # US Core 6.1, with the next two
        ("r4", "Encounter", {"hospitalization": {"dischargeDisposition": _CODE}}, "discharge-disposition=c"),
        ("r4", "Condition", {"extension": [{"url": "http://x.example", "valueDateTime": "2020"}, {
            "valueDateTime": "2026",
            "url": "http://hl7.org/fhir/StructureDefinition/condition-assertedDate"}]},
         "asserted-date=2026", "asserted-date=2020"),
        ("r4", "ExplanationOfBenefit", {  # CARIN
            "type": _CODE, "insurer": _END, "payee": {"party": _ILL}, "careTeam": [{"provider": _VISIT}],
            "item": [{"servicedPeriod": {"start": "2025-01-01", "end": "2025-02"}}, {"servicedDate": "2024"}],
            "billablePeriod": {"start": "2026-01-01", "end": "2026-03-01"}},
         ("type=c insurer=e payee=c care-team=e service-date=2024 service-date=ap2025-02 "
          "service-date=ap2026-03 service-start-date=2024 service-start-date=2025-01-01 "
          "service-start-date=2026-01-01 billable-period-start=2026-01-01"),
         "service-start-date=ap2025-02 service-start-date=ap2026-03 billable-period-start=ap2026-03"),
        ("r4", "Observation", {"component": [{"code": _CODE}]}, "combo-code=c"),
        ("stu3 r4", "Organization", {"name": "UMich", "alias": ["Michigan Health"]},
         "name=Michigan name=umich name:exact=Michigan%20Health", "name=health"),
        ("stu3 r4", "Location", {"alias": ["Old Ward", "B"]}, "name=old name=b", "name=ward"),
        ("r4", "Observation", {"effectiveTiming": _DAYS}, _FOUND + " date=lt2020-01-11", _LOST),
        ("r4", "Observation", {"effectiveTiming": _BOUNDS}, _FOUND + " date=le2020-02", _LOST),
        ("r4", "Observation", {"effectiveTiming": {**_DAYS, "repeat": {"boundsPeriod": {
            "start": "2020-01-11"}}}}, _FOUND + " date=ge2030", _LOST),
        ("r4", "Observation", {"effectiveTiming": {"event": [{"event": {}}]}}, "date:missing=true", _FOUND),
        ("r4", "ServiceRequest", {"occurrenceTiming": _DAYS}, _FOUND.replace("date", "occurrence"),
         "occurrence:missing=true"),
        ("stu3", "ProcedureRequest", {"occurrenceTiming": _BOUNDS}, _FOUND.replace("date", "occurrence"),
         "occurrence=lt2020"),
        ("r4", "Substance", {"ingredient": {"substanceCodeableConcept": {"code": "x"}}}, "code=x", "code=y"))

    def test_a_parameter_looks_into_every_element_that_its_versions_registry_names(self) -> None:
        """In SQL and in Python; beside a resource that has nothing, and is found by what it lacks."""
        for version in s4s.FHIR_VERSIONS:
            with s4s.Server(fhir_version=version, data="none") as portal:
                rows = [row[1:] for row in self.of_registries if version in row[0]]
                for name, content, finds, *others in rows:
                    resource, nothing = ({"resourceType": name, "id": key} for key in ("x", "y"))
                    resource.update(content)
                    for loaded in (resource, nothing):
                        portal.load(loaded)
                    for query in " ".join([finds, *others]).split():
                        with self.subTest(version=version, name=name, query=query):
                            found = ids_within(ask(f"{portal.open_fhir_url}/{name}?{query}").json)
                            expected = ["x"] if query in finds.split() else []
                            expected += ["y"] if query.endswith(("missing=true", "deceased=false")) else []
                            self.assertEqual(found, expected)
                            matches = s4s.resource_matches(resource, version, parse_qsl(query))
                            self.assertEqual(matches, "x" in found)

    def test_quantities_are_compared_as_precisely_as_they_are_written(self) -> None:
        system = "http://unitsofmeasure.org"
        for value in (5.35, 5.4, 5.5, -1, "5"):
            self.portal.load(made(f"Observation/v{value}", valueQuantity={
                "value": value, "unit": "milli", "system": system, "code": "mg"}))
        for text, ids in (
                ("5.4", "v5.35 v5.4"), ("5.40", "v5.4"), ("5", "v5.35 v5.4 v5.5"), ("gt5.4", "v5.5"),
                ("sa5.4", "v5.5"), ("ge5.4", "v5.4 v5.5"), ("ap5", "v5.35 v5.4"), ("lt5.4", "v-1 v5.35"),
                ("eb5.35", "v-1"), ("-1", "v-1"), ("0.54e1", "v5.35 v5.4"), ("le6", "v-1 v5.35 v5.4 v5.5")):
            for unit in ("||mg", f"|{system}|mg", "||milli"):
                with self.subTest(text + unit):
                    ours = self.ids(f"Observation?value-quantity={text}{quote(unit)}&_sort=value-quantity")
                    self.assertEqual(ours, ids.split())
        self.finds(*((f"Observation?value-quantity=5.4{unit}", []) for unit in ("||kg", "|http://x|mg")))
        for bad in ("x", "xx5", "5|", "5|mg", "1e999", "5.4|a|b|c"):
            self.assert_refused(f"Observation?value-quantity={bad}", 400, "value-quantity")

    def test_provenances_come_with_what_they_are_about(self) -> None:
        first, theirs = (self.ids(f"Observation?patient={patient}")[0] for patient in (DANIEL, AMY))
        for key, names in (("p", [first]), ("q", [first, theirs]), ("r", [theirs])):
            self.portal.load(made(f"Provenance/{key}", target=[to(f"Observation/{name}") for name in names]))
        query = f"Observation?_id={first}&_revinclude=Provenance:target"
        for scope, path, ids in (
                ("patient/*.rs", query, [first, "p"]), ("patient/Observation.rs", query, [first]),
                ("patient/*.rs", f"Provenance?patient={DANIEL}&_id=p,q&_include=Provenance:target",
                 ["p", first]), ("patient/*.rs", f"Provenance?target=Observation/{theirs}", []),
                ("patient/*.rs", f"Provenance?target=Observation/{first}", ["p"])):
            with self.subTest(scope=scope, path=path):
                self.assertEqual(ids_within(self.fhir(path, self.portal.issue_token(scope=scope)).json), ids)
        whole = self.fhir(f"Patient/{DANIEL}/$everything", self.portal.issue_token(scope="patient/*.rs")).json
        self.assertEqual({"p", "q", "r"} & set(ids_within(whole)), {"p"})

    def test_strings_begin_with_the_value_whatever_case_and_accents(self) -> None:
        name = {"family": "Zo\u00eb-M\u00fcller", "given": ["\u00c5sa"]}
        self.portal.load(made("Patient/zoe", name=[name]))
        self.finds(("Patient?name=ZOE", ["zoe"]), ("Patient?family=zo%C3%AB-m", ["zoe"]),
                   ("Patient?name=muller", []), ("Patient?name:contains=muller", ["zoe"]),
                   ("Patient?given:exact=%C3%85sa", ["zoe"]), ("Patient?given:exact=asa", []),
                   ("Patient?name=adam", [DANIEL]), ("Patient?given=dan,amy", [AMY, DANIEL]))

    def test_modifiers_ids_times_and_repeated_parameters(self) -> None:
        moment = self.read(f"Patient/{DANIEL}")["meta"]["lastUpdated"]
        self.finds(("Patient?gender=male&birthdate=ge1926", [JOSEPH]), ("Patient?gender:not=male", [AMY]),
                   ("Patient?birthdate=gt1925&birthdate=lt2005", [JOSEPH]),
                   ("Patient?gender:missing=false", [AMY, JOSEPH, DANIEL]),
                   ("Patient?gender:missing=true", []), (f"Patient?_id={DANIEL},{AMY},x", [AMY, DANIEL]),
                   (f"Patient?_lastUpdated={moment}", [DANIEL]))
        self.assertNotIn(DANIEL, self.ids(f"Patient?_lastUpdated=gt{moment}"))
        for these, others in (("encounter:missing=false", "encounter:missing=true"),
                              ("_lastUpdated=lt2017", "_lastUpdated=ge2017")):
            counts = [len(self.ids(f"Observation?{query}")) for query in (these, others)]
            self.assertTrue(all(counts))
            self.assertEqual(sum(counts), len(self.ids("Observation")))

    def test_a_search_in_sql_and_a_match_in_python_mean_the_same(self) -> None:
        """Of all samples, by each parameter: for the first of their own values, and for more by its kind."""
        more = {"id": f"={DANIEL}", "date": "=ge2009 :missing=true", "updated": "=ge2009",
                "token": ":missing=true :text=a", "string": ":missing=true", "reference": ":missing=true"}
        for version in s4s.FHIR_VERSIONS:
            settings = s4s.Settings(fhir_version=version)
            records = self.during(contextlib.closing(s4s.EmbeddedRecords(settings, s4s.Clock())))
            for type_name, known in s4s.search_table(version).items():
                rows = records._filled().rows("SELECT json FROM resources WHERE type = ?", type_name)
                resources = [json.loads(row["json"]) for row in rows]
                for name, (kind, paths) in known.items():
                    given = [value for each in resources[:40] for value in s4s.elements(each, *paths)]
                    values = {f"{row[3]}|{row[2]}|{row[1]}" if kind == "quantity" else row[1] or "2008"
                              for row in s4s.values_of(name, kind, given)}
                    pairs = [(name, value.replace(",", "\\,")) for value in sorted(values)[:3]]
                    pairs += parse_qsl("&".join(name + end for end in more.get(kind, "").split()))
                    for pair in pairs:
                        with self.subTest(version=version, type=type_name, pair=pair):
                            query = s4s.parse_query(version, type_name, (pair, ("_count", "1000")))
                            matches = {match.id for match in records.search(query, s4s.OPEN_ACCESS).matches}
                            self.assertEqual(matches, {each["id"] for each in resources
                                                       if s4s.resource_matches(each, version, [pair])})

    def test_sort_by_several_parameters_missing_ones_last(self) -> None:
        keys = [(resource["effectiveDateTime"], min(code["code"] for code in resource["code"]["coding"]))
                for resource in self.resources("Observation?_sort=-date,code")]
        by_code = sorted(keys, key=lambda key: key[1])
        self.assertEqual(keys, sorted(by_code, key=lambda key: key[0], reverse=True))
        visits = [resource.get("encounter", {}).get("reference", "~")
                  for resource in self.resources("Observation?_sort=encounter")]
        self.assertEqual((visits, visits[-1]), (sorted(visits), "~"))
        self.assertEqual(self.ids("Patient?_sort=-_id"), [DANIEL, JOSEPH, AMY])

    def test_sorting_downwards_is_written_as_the_version_writes_it(self) -> None:
        for version, query, expected in (("dstu2", "_sort:desc=date", "321"),
                ("dstu2", "_sort:asc=date", "123"), ("dstu2", "_sort=date", "123"),
                ("dstu2", "_sort:asc=status&_sort:desc=date", "321"), ("dstu2", "_sort=-date", "_sort:desc"),
                ("dstu2", "_sort:desc=colour", "colour"), ("stu3", "_sort=-date", "321"),
                ("stu3", "_sort:desc=date", "_sort"), ("r4", "_sort=status,-date", "321")):
            with self.subTest(version=version, query=query), s4s.Server(fhir_version=version) as portal:
                for day in (2, 3, 1):
                    portal.load(observation(str(day), effectiveDateTime=f"2020-01-0{day}"))
                url = f"{portal.open_fhir_url}/Observation?_id=1,2,3&_count=2&{query}"
                if expected.isdecimal():
                    keys = [key for page in pages_from(url) for key in ids_within(page)]
                    self.assertEqual("".join(keys), expected)
                else:
                    self.assertIn(expected, ask(url).json["issue"][0]["diagnostics"])

    def test_a_search_with_more_values_than_the_database_takes_is_too_costly(self) -> None:
        log = log_of(self.portal)
        for name, one, most in (("date", "ne2008-01-01", 250), ("date", "gt2008", 500),
                                ("_lastUpdated", "ne2008", 250), ("code", "http://loinc.org%7C1", 500)):
            for joint in (",", f"&{name}="):
                for count, status in ((most, 200), (most + 1, 400), (495, 200 if most == 500 else 400)):
                    with self.subTest(one=one, joint=joint, count=count):
                        got = self.get(f"Observation?{name}={joint.join([one] * count)}")
                        self.assertEqual((got.status, "too-costly" in got.text), (status, status == 400))
        self.assert_refused(f"Observation?date={'ne2008,' * 200}ne2008&code={'x,' * 200}x", 400, "500", "ne")
        self.assertNotIn("DATABASE", " ".join(log))

    def test_a_walk_over_the_pages_is_whole_though_records_are_loaded_meanwhile(self) -> None:
        for sort in ("", "&_sort=-date", "&_sort=code,-_lastUpdated"):
            with self.subTest(sort=sort):
                self.portal.reset()
                at_start, seen, number = set(self.ids("Observation?category=vital-signs")), [], 0
                url = f"{self.portal.open_fhir_url}/Observation?category=vital-signs&_count=17{sort}"
                for page in pages_from(url):
                    seen += ids_within(page)
                    for date in ("1900-01-01", "2008-01-01", "2100-01-01"):
                        number += 1
                        vital, rate = {"coding": [{"code": "vital-signs"}]}, {"coding": [{"code": "8867-4"}]}
                        self.portal.load(observation(f"new-{number}", AMY if number % 2 else DANIEL,
                                                     effectiveDateTime=date, category=[vital], code=rate))
                self.assertEqual((len(seen), at_start - set(seen)), (len(set(seen)), set()))

    def test_include_and_revinclude(self) -> None:
        got = self.read(f"MedicationRequest?patient={DANIEL}&_count=2&_include=MedicationRequest:requester"
                        "&_include=MedicationRequest:subject")["entry"]
        modes = [f"{entry['search']['mode']} {entry['resource']['resourceType']}" for entry in got]
        self.assertEqual(modes, 2 * ["match MedicationRequest"] + ["include Practitioner", "include Patient"])
        got = self.read(f"Patient?_id={DANIEL}&_revinclude=Encounter:patient")
        self.assertEqual(sorted(ids_within(got)[1:]), self.ids(f"Encounter?patient={DANIEL}"))
        visit, *readings = within(self.read("Encounter?_count=1&_revinclude=Observation:encounter"))
        found = {reading["encounter"]["reference"] for reading in readings}
        self.assertEqual(found, {f"Encounter/{visit['id']}"})
        for name, more in (("*", {"Patient"}), ("*:Practitioner", set())):
            got = within(self.read(f"MedicationRequest?_count=3&_include=MedicationRequest:{name}"))
            types = {resource["resourceType"] for resource in got}
            self.assertEqual(types, {"MedicationRequest", "Practitioner", *more})
        every = within(self.read(f"Patient?_id={DANIEL}&_revinclude=Observation:*"), "include")
        self.assertEqual(len(every), len(self.ids(f"Observation?patient={DANIEL}")))

    def test_answers_come_with_their_questionnaire_by_reference_or_by_its_own_name(self) -> None:
        form = "http://forms.example/pain"
        forms = {"q1": ("pain", "1"), "q2": ("pain", "2"), "q3": ("x", "1")}
        for version, asked, ids in (
                *((version, to("Questionnaire/q1"), "q1") for version in ("dstu2", "stu3")),
                ("r4", form, "q1 q2"), ("r4", form + "|2", "q2"), ("r4", form + "|3", ""),
                ("r4", "Questionnaire/q3", "q3")):
            with self.subTest(asked=asked), s4s.Server(fhir_version=version, data="none") as portal:
                portal.load(made("Patient/p"))
                for key, (name, nth) in forms.items():
                    portal.load(made(f"Questionnaire/{key}", version=nth, url=f"http://forms.example/{name}"))
                for key in ("mine", "theirs"):
                    portal.load(made(f"QuestionnaireResponse/{key}", questionnaire=asked,
                                     subject=to("Patient/p" if key == "mine" else "Patient/other")))
                token = portal.issue_token(username="p", scope="patient/*.rs")["access_token"]
                answers = "QuestionnaireResponse"
                for path, expected in (
                        (f"{answers}?_include={answers}:questionnaire", ["mine", *ids.split()]),
                        (f"{answers}?_include={answers}:*", ["mine", "p", *ids.split()]),
                        *((f"Questionnaire?_id={key}&_revinclude={answers}:questionnaire", [key, "mine"])
                          for key in ids.split()), ("Questionnaire", [*forms])):
                    got = ask(f"{portal.fhir_url}/{path}", token=token).json
                    self.assertEqual(sorted(ids_within(got)), sorted(expected), path)
                self.assertEqual(ask(f"{portal.fhir_url}/Questionnaire/q1", token=token).status, 200)

    def test_codes_are_found_by_the_words_beside_them(self) -> None:
        coding, licence = {"code": "2093-3", "display": "Cholesterol, all"}, {"text": "Driver's licence"}
        self.portal.load(observation("w", code={"text": "Total Chol\u00e9sterol", "coding": [coding]}))
        self.portal.load(made("Patient/n", identifier=[{"value": "1", "type": licence}], gender="female"))
        words = "_id=w&code:text="
        self.finds(*((f"Observation?{words}{text}", ["w"]) for text in (
                       "total", "TOTAL%20chole", "cholesterol%5C,%20ALL", "none,chol", "Total&code=2093-3")),
                   *((f"Observation?{words}{text}", []) for text in ("2093", "all", "tot%25", "total%20x")),
                   ("Patient?identifier:text=driver", ["n"]), ("Patient?gender:text=female", []))
        rates = self.resources("Observation?code:text=heart")
        self.assertEqual({rate["code"]["coding"][0]["code"] for rate in rates}, {"8867-4"})
        token = self.portal.issue_token(scope="patient/Observation.rs", patient_id=AMY)
        self.assertEqual(self.fhir("Observation?code:text=total&_id=w", token).json["total"], 0)

    def test_included_resources_need_their_own_scope_and_patient(self) -> None:
        token = self.portal.issue_token(scope="patient/Encounter.rs patient/Practitioner.rs")
        path = ("Encounter?_include=Encounter:subject&_include=Encounter:participant"
                "&_revinclude=Observation:encounter")
        self.assertEqual(self.types(path, token), {"Encounter", "Practitioner"})
        josephs = self.portal.issue_token(scope="patient/*.rs", username="joseph-ross")
        path = "Practitioner?_revinclude=Encounter:participant"
        self.assertEqual(self.types(path, josephs), {"Practitioner"})
        doctors = self.portal.issue_token(username="clinician", scope="user/*.rs")
        self.assertEqual(self.types(path, doctors), {"Practitioner", "Encounter"})
        # However many there are that may not be seen, they take no places.
        visit = self.resources(f"Encounter?patient={DANIEL}")[0]
        self.portal.load({**visit, "id": "coming", "status": "planned"})
        coming = self.portal.issue_token(scope="patient/Practitioner.rs patient/Encounter.rs?status=planned")
        with mock.patch.object(s4s, "MAX_INCLUDED", 2):
            self.assertEqual(self.types(path, coming), {"Practitioner", "Encounter"})

    def test_what_is_not_known_is_named_with_what_is(self) -> None:
        marks = "x AA bnVsbA WzFd WyJhIiwgMWU5OTld WyJhIiwgOTk5OTk5OTk5OTk5OTk5OTk5OTldw"  # made up
        for query, *words in (
                ("colour=red", "colour", "category", "_sort"), ("_include=*", "Observation:encounter"),
                ("_include=Patient:*", "Observation:*"), ("_revinclude=Patient:*", "DiagnosticReport:*"),
                ("status:above=x", "status:above", "missing", "text"), ("date:text=x", "date:text"),
                ("_has:Provenance:target:x=y", "_has"),
                ("patient:not=x", "patient:not", "Patient"), ("_filter=x", "_filter"), ("code:=x", "code:"),
                ("patient.name=x", "patient.name"), ("_include=Observation:code", "Observation:encounter"),
                ("_revinclude=Patient:link", "DiagnosticReport:result"), ("_sort=colour", "colour", "date"),
                ("_include:iterate=Observation:encounter", "_include:iterate"), ("_summary=all", "count"),
                ("date=soon", "soon", "2008-07-10"), ("_count=many", "_count", "number"),
                ("_total=maybe", "accurate"), ("code:missing=maybe", "true"), ("code=" + "x," * 500, "500"),
                *(("_page=" + mark, "_page") for mark in marks.split())):
            with self.subTest(query=query):
                self.assert_refused(f"Observation?{query}", 400, *words)

    def test_lenient_handling_leaves_out_what_is_not_known(self) -> None:
        lenient, url = {"Prefer": "handling=lenient"}, f"{self.portal.open_fhir_url}/Patient?gender=female"
        got = self.read("Patient?colour=red&gender=female&name:text=x", headers=lenient)
        self.assertEqual((got["total"], got["link"][0]["url"]), (1, url))
        self.assert_refused("Patient?birthdate=soon", 400, "soon", headers=lenient)
        more = "_include=Patient:colour&_revinclude=x&_sort=-birthdate,colour&_sort=family"
        got = self.read(f"Patient?{more}", headers=lenient)
        self.assertEqual(ids_within(got), [DANIEL, JOSEPH, AMY])
        self.assertEqual(got["link"][0]["url"], f"{self.portal.open_fhir_url}/Patient?_sort=family")

    def test_a_total_is_the_number_that_can_be_paged_to_whatever_the_count(self) -> None:
        """Two Observations of a patient among three of a Group, which is nobody's record."""
        group = [observation(f"g{number}", subject=to("Group/1")) for number in range(3)]
        mine = [observation(f"p{number}", subject=to("Patient/1p")) for number in range(2)]
        with s4s.Server(data=["none"]) as portal:
            for resource in (group[0], mine[0], made("Patient/1p"), *group[1:], mine[1]):
                portal.load(resource)
            base, service = portal.fhir_url, KeyedApp(portal).token().json
            clinician, his = (portal.issue_token(username="clinician", patient_id="1p", scope=scope)
                              for scope in ("user/*.rs patient/*.rs", "patient/*.rs"))
            for who, url, token, number in (
                    ("a clinician", base, clinician, 2), ("the patient", base, his, 2),
                    ("a service", base, service, 5), ("anybody", portal.open_fhir_url, {}, 5)):
                value = token.get("access_token", "")
                for query in ("_summary=count", "_count=0", "_count=1", "_count=2", "_count=3", "",
                              "_sort=-date", "_count=1&_sort=status", "status=final"):
                    with self.subTest(who=who, query=query):
                        pages = list(pages_from(f"{url}/Observation?{query}", value))
                        self.assertEqual({page["total"] for page in pages}, {number})
                        if "=0" in query or "=count" in query:
                            self.assertNotIn("entry", pages[0])
                        else:
                            self.assertEqual(sum(len(page["entry"]) for page in pages), number)
                self.assertNotIn("total", ask(f"{url}/Observation?_total=none", token=value).json, who)
                self.assertEqual(ask(f"{url}/Observation/g1", token=value).status == 200, number == 5, who)

    def steps(self, call: Callable[[], Any]) -> int:
        """How much the database of the records does meanwhile, in thousands of its own steps."""
        database: Any = self.portal.portal.records
        count = itertools.count()
        database.store.connection.set_progress_handler(lambda: next(count) < 0, 1000)
        call()
        database.store.connection.set_progress_handler(None, 1000)
        return next(count)

    def test_what_is_hidden_costs_a_sorted_search_no_more_than_its_number(self) -> None:
        records, costs = s4s.EmbeddedRecords(s4s.Settings(data=["none"]), s4s.Clock()), list[int]()
        self.addCleanup(records.close)
        access = s4s.Access("patient/*.rs", DANIEL, labels=frozenset(["vital-signs"]))
        with mock.patch.object(self.portal.portal, "records", records):
            for size in (1000, 1000, 2000, 4000):  # 1,000 to 8,000 in all
                records.load(bundle_of(*(
                    observation(f"{len(costs)}-{day}", effectiveDateTime=f"20{10 + day % 90}")
                    for day in range(size))))
                query = s4s.parse_query("r4", "Observation", (("_sort", "-date"), ("_count", "9")))
                costs.append(self.steps(lambda query=query: records.search(query, access)))  # type: ignore[misc]
        self.assertLess(costs[3], 24 * costs[0], costs)  # to sort anew for each 500 was 64 times as much

    def test_a_load_costs_no_more_for_the_references_that_wait(self) -> None:
        costs = []
        for _ in range(3):
            doctors = [to(f"Practitioner?identifier=http://x|{number}") for number in range(500)]
            self.portal.load(observation(secrets.token_hex(8), performer=doctors))
            costs.append(self.steps(lambda: [self.portal.load(observation(f"late-{n}")) for n in range(20)]))
        self.assertLess(costs[2], 1.5 * costs[0] + 2, costs)
        doctor = made("Practitioner", identifier=[{"system": "http://x", "value": "7"}])
        self.portal.load({**doctor, "id": "seven"})
        self.assertEqual(len(self.ids("Observation?performer=Practitioner/seven")), 3)

    def test_a_page_is_full_though_much_of_what_matches_may_not_be_seen(self) -> None:
        token = self.portal.issue_token(scope="patient/Observation.rs?category=laboratory")["access_token"]
        pages = pages_from(f"{self.portal.fhir_url}/Observation?_count=30", token)
        sizes = [len(page["entry"]) for page in pages]
        self.assertEqual(set(sizes[:-1]), {30})
        self.assertEqual(sum(sizes), len(self.ids(f"Observation?category=laboratory&patient={DANIEL}")))
        url = f"{self.portal.fhir_url}/Observation?category=laboratory"
        self.assertNotIn("total", ask(url, token=token).json, "?param=value narrows it")

    def test_the_links_to_further_pages_are_the_same_whatever_is_hidden_or_others(self) -> None:
        vital, lab = ([{"coding": [{"code": code}]}] for code in ("vital-signs", "laboratory"))
        mine = [observation(name, category=vital, effectiveDateTime="2020") for name in "aceg"]
        rest = [observation("b", category=lab), observation("d", AMY, category=vital), observation("h", AMY)]
        for search in ("Observation?_count=1", "Observation?_count=1&_sort=-date",
                       f"Patient/{DANIEL}/$everything?_count=1"):
            marks = []
            for more in ([], rest):
                there = [made(f"Patient/{DANIEL}"), *mine[:2], *more, *mine[2:]]
                with self.subTest(search), s4s.Server(data=["none", bundle_of(*there)]) as portal:
                    scope = "patient/Patient.rs patient/Observation.rs?category=vital-signs"
                    token = portal.issue_token(scope=scope, username=DANIEL)["access_token"]
                    pages = list(pages_from(f"{portal.fhir_url}/{search}", token))
                    marks.append([next_of(page).partition("_page=")[2] for page in pages])
            self.assertEqual(marks[0], marks[1])

    def test_each_version_has_its_own_names(self) -> None:
        for row in """\
Condition | patient:234 subject:34 clinicalstatus:2 clinical-status:34 asserted-date:34 recorded-date:4
MedicationOrder | datewritten:2 prescriber:2 patient:2 authoredon: subject:
MedicationRequest | authoredon:34 intent:34 context:3 encounter:4 datewritten: _id:34
MedicationAdministration | effectivetime:2 prescription:23 effective-time:34 request:4
Coverage | patient:34 beneficiary:34 status:4 identifier:34 issuer:
ExplanationOfBenefit | claim:34 type:4 service-date:4 insurer:4
Observation Condition Procedure DiagnosticReport | context:3 encounter:234 episode:
CarePlan | context:3 encounter:34 identifier:34 intent:34 category:234 patient:234
CareTeam | context:3 encounter:34
DiagnosticOrder | encounter:2 context:
Questionnaire | code:234 identifier:234 url:34 name:34 patient:
QuestionnaireResponse | context:3 encounter:24 identifier:34
AdverseEvent Endpoint | _id:34 patient:
Location Patient | _id:234 patient:""".splitlines():
            types, names = row.split(" | ")
            for type_name, word in itertools.product(types.split(), names.split()):
                name, _, expected = word.partition(":")
                served = [number for number, version in (("2", "dstu2"), ("3", "stu3"), ("4", "r4"))
                          if name in s4s.search_table(version).get(type_name, {})]
                self.assertEqual("".join(served), expected, f"{type_name}?{name}")

    def test_the_searches_that_apps_send_find_something_in_each_version(self) -> None:
        queries = """Observation?code=http://loinc.org%7C72166-2 Observation?category=social-history Condition
            Observation?category=laboratory Observation?category=vital-signs MedicationStatement Encounter
            MedicationDispense MedicationAdministration AllergyIntolerance Procedure Immunization
            DocumentReference ImagingStudy DiagnosticReport Goal Provenance
            CarePlan?category=assess-plan&status=active&date=gt2009 Device Device?type=14106009
            Condition?category=health-concern QuestionnaireResponse Observation?code=3141-9
            Observation?code=55284-4 Observation?code=2089-1 Observation?code=4548-4"""
        later = f"""MedicationRequest Coverage Coverage?beneficiary={DANIEL} ExplanationOfBenefit
            CareTeam?status=active"""
        first = "MedicationOrder CarePlan?category=careteam"
        others = """Observation?category=social-history Condition AllergyIntolerance MedicationStatement
            Immunization"""
        for version, more in (("dstu2", first), ("stu3", later), ("r4", later)):
            with s4s.Server(fhir_version=version) as portal:
                token = portal.issue_token(scope="patient/*.read")["access_token"]
                for query in [*queries.split(), *more.split()]:
                    path = f"{query}{'&' if '?' in query else '?'}patient="
                    for more_of_it, found in ((DANIEL, True), (f"Patient/{DANIEL}&_lastUpdated=gt2015", True),
                                              (f"{DANIEL}&_lastUpdated=gt2019", False)):
                        with self.subTest(version=version, path=path + more_of_it):
                            got = ask(f"{portal.fhir_url}/{path}{more_of_it}", token=token)
                            self.assertEqual(bool(got.json.get("entry")), found, got)
                for patient, query in itertools.product((AMY, JOSEPH), [*others.split(), more.split()[0]]):
                    path = f"{query}{'&' if '?' in query else '?'}patient={patient}"
                    self.assertIn("entry", ask(f"{portal.open_fhir_url}/{path}").json, (version, path))
                laboratory = ask(f"{portal.fhir_url}/Observation?category=laboratory", token=token).json
                self.assertIn("next", [link["relation"] for link in laboratory["link"]])
                document = ask(f"{portal.fhir_url}/DocumentReference?patient={DANIEL}", token=token)
                url = document.json["entry"][0]["resource"]["content"][0]["attachment"]["url"]
                file, binary = (ask(f"{portal.fhir_url}/{url}{query}", token=token)
                                for query in ("", "?_format=json"))
                self.assertEqual(file.headers["content-type"], binary.json["contentType"])
                self.assertIn(base64.b64encode(file.body).decode(), binary.text)


# ######################################################################## 18 embedded records

class Reading(RecordsTest):
    """Reads of the embedded records."""
    def test_etag_and_last_modified_spare_a_second_transfer(self) -> None:
        got = self.get(f"Patient/{DANIEL}")
        tag, when = got.headers["etag"], got.headers["last-modified"]
        self.assertEqual((tag, when), ('W/"1"', "Thu, 07 Jan 2016 12:00:00 GMT"))
        for known, since, status in ((tag, "", 304), ('"0", "1"', "", 304), ("*", "", 304), ('"0"', "", 200),
                                     ("", when, 304), ('"0"', when, 200), ("", "nonsense", 200),
                                     ("", "Thu, 07 Jan 2016 11:59:59 GMT", 200)):
            with self.subTest(known=known, since=since):
                names = {"If-None-Match": known, "If-Modified-Since": since}
                headers = {name: text for name, text in names.items() if text}
                again = self.get(f"Patient/{DANIEL}", headers=headers)
                self.assertEqual((again.status, again.headers["etag"]), (status, tag))
                self.assertEqual(again.body == b"", status == 304)

    def test_a_long_name_costs_no_more_than_its_length(self) -> None:
        self.portal.load({**made("Basic/1"), "A" * 20_000: 1, "valueA" + "A" * 20_000: 1})
        tracemalloc.start()
        for query in ("_pretty=true", "_elements=value", f"_elements={'A' * 9000}"):
            self.assertEqual(self.at(f"/api/open-fhir/Basic/1?{query}").status, 200)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(peak, 10_000_000)

    def test_the_current_version_can_be_read_by_its_number(self) -> None:
        self.assertEqual(self.read(f"Patient/{DANIEL}/_history/1")["id"], DANIEL)
        self.assert_refused(f"Patient/{DANIEL}/_history/2", 404, "current")

    def test_everything_is_the_compartment_and_what_it_refers_to(self) -> None:
        token = self.portal.issue_token(scope="patient/*.rs", patient_id=AMY)
        path = f"Patient/{AMY}/$everything"
        self.assertEqual(set(map(s4s.owner, within(self.fhir(path, token).json, "match"))), {AMY})
        self.assertGreater(len(self.types(path, token, "match")), 4)
        self.assertEqual(self.types(path, token, "include"), {"Location", "Organization", "Practitioner"})
        self.assertEqual(self.get("Patient/nobody/$everything").status, 404)
        scope = "patient/Patient.rs patient/Condition.rs patient/Observation.r patient/Organization.r"
        token = self.portal.issue_token(scope=scope, patient_id=AMY)
        self.assertEqual(self.types(path, token), {"Patient", "Condition"}, "what is read and searched")
        self.portal.load(bundle_of(
            made("Device/his", patient=to(f"Patient/{DANIEL}")), made("Device/nobodys"),
            observation("x", AMY, device=to("Device/his"), focus=[to("Device/nobodys")])))
        self.assertEqual({"his", "nobodys"} & {*ids_within(self.read(path))}, {"nobodys"})

    def test_everything_comes_in_pages_and_takes_types_a_beginning_and_what_changed_since(self) -> None:
        who, doctor = to("Patient/e"), to("Practitioner/dr")
        for name, key, updated, more in (
                ("Patient", "e", "2020", {"birthDate": "1960"}), ("Practitioner", "dr", "2026-01-15", {}),
                ("Observation", "old", "2020", {
                    "subject": who, "effectiveDateTime": "2001-05-05", "valueDateTime": "2021-01-01"}),
                ("Observation", "new", "2026-02", {
                    "subject": who, "effectiveDateTime": "2021-05-05", "performer": [doctor]}),
                ("Condition", "long", "2020", {
                    "subject": who, "onsetDateTime": "2001", "abatementDateTime": "2030"}),
                ("Coverage", "undated", "2026-01-01T00:00:00Z", {"beneficiary": who})):
            self.portal.load({"resourceType": name, "id": key, "meta": {"lastUpdated": updated}, **more})
        token = self.portal.issue_token(username="clinician", patient_id="e", scope="patient/*.rs")
        for query, ids in (*((query, "long undated new old e dr") for query in ("", "_count=1", "_count=2")),
                ("_since=2026-01-01T00:00:00Z", "undated new dr"), ("_since=2026-01-01T00:00:01Z", "new dr"),
                ("_since=2027", ""), ("_since=2026-02", "new"), ("_type=Observation,Patient", "new old e"),
                ("_type=Observation&_type=Patient", "new old e"), ("_type=Practitioner", "dr"),
                ("_type=Observation,Practitioner,Slot", "new old dr"), ("_type=Slot", ""),
                ("start=2010-01-01", "long undated new e dr"), ("end=2001-05-05", "long undated old e"),
                ("start=2001-05-06&end=2020", "long undated e"), ("start=2031&_type=Condition", ""),
                ("_type=Observation&_since=2026&start=2020&end=2022&_count=1", "new"),
                ("_type=Observation&_count=1", "new old"), ("_type=Practitioner&_count=1", "dr"),
                ("_type=Patient,Organization&_count=1", "e"), ("_type=Organization&_count=1", "")):
            with self.subTest(query=query):
                url = f"{self.portal.fhir_url}/Patient/e/$everything?{query}"
                pages = list(pages_from(url, token["access_token"]))
                self.assertEqual({key for page in pages for key in ids_within(page)}, set(ids.split()))
                self.assertTrue(len(pages) == 1 or all(map(ids_within, pages)), "no page is empty")
                walk = [ids_within(page, "match") for page in pages]
                self.assertEqual(list(itertools.chain(*walk)), [key for key in ids.split() if key != "dr"])
                self.assertLessEqual(max(map(len, walk)), int(dict(parse_qsl(query)).get("_count", 1000)))
        for query, word in (("_since=soon", "_since"), ("start=x", "start"), ("end=2020-13", "end"),
                            ("colour=red", "_type")):
            self.assert_refused(f"Patient/e/$everything?{query}", 400, word, query.partition("=")[0])

    def test_other_operations_and_paths_are_refused(self) -> None:
        for status, *paths in (
                (403, f"Patient/{DANIEL}/$summary", "Patient/$everything", "$export", "Binary?_id=x"),
                (404, f"Patient/{DANIEL}/x/y", "Patient/a%2Fb", "Patient/..", "Colour", "Conformance/1")):
            for path in paths:
                self.assertEqual(self.get(path).status, status, path)

    def test_json_in_any_spelling_is_answered_in_the_versions_own(self) -> None:
        for version, own, ours in (("r4", "application/fhir+json", "4.0"),
                                   ("dstu2", "application/json+fhir", "1.0")):
            with s4s.Server(fhir_version=version) as portal:
                for path, accept, expected in (
                        ("", "", own), ("", "*/*", own), ("", "application/fhir+json", own),
                        ("", "application/json+fhir", own), ("", "application/json", "application/json"),
                        ("", "text/html, application/json;q=0.5, */*;q=0.1", own), ("", "text/html", ""),
                        ("?_format=json", "text/html", own), ("?_format=application/fhir+json", "", own),
                        ("?_format=application/json", "", "application/json"), ("?_format=xml", "", ""),
                        ("", "application/fhir+xml", ""), ("", "application/json;q=0", ""),
                        # R4 http, "FHIR Version Parameter"
                        ("", own + "; fhirVersion=3.0", ""), ("?_format=json;fhirVersion=3.0", "", ""),
                        ("", own + ";fhirVersion=3.0, application/json;q=0.1", "application/json"),
                        ("", own + f"; fhirVersion={ours}", own), ("", own + f'; fhirVersion="{ours}"', own),
                        ("", own + "; fhirversion=4.3", own if version == "r4" else "")):
                    with self.subTest(version=version, path=path, accept=accept):
                        url = f"{portal.open_fhir_url}/Patient"
                        asked = [ask(f"{url}/{DANIEL}{path}", headers={"Accept": accept})]
                        if path:
                            asked.append(ask(f"{url}/_search", form=parse_qsl(path[1:])))
                        for got in asked:
                            self.assertEqual(got.headers["content-type"], expected or own)
                            self.assertEqual(got.status, 200 if expected else 406)

    def test_pretty_is_for_people(self) -> None:
        self.assertNotIn("\n", self.get(f"Patient/{DANIEL}").text)
        self.assertIn('\n  "id": ', self.get(f"Patient/{DANIEL}?_pretty=true").text)

    def test_the_metadata_lists_what_works_in_each_version(self) -> None:
        for version, number in s4s.FHIR_VERSIONS.items():
            with s4s.Server(fhir_version=version) as portal:
                got = ask(f"{portal.fhir_url}/metadata").json
                kind = "Conformance" if version == "dstu2" else "CapabilityStatement"
                self.assertEqual((got["resourceType"], got["fhirVersion"]), (kind, number))
                self.assertIn("_count, _since, _type, end, start", json.dumps(got))  # of $everything
                for resource in got["rest"][0]["resource"]:
                    parameters = [(known["name"], "2008") for known in resource.get("searchParam", [])]
                    parameters += [("_include", value) for value in resource.get("searchInclude", [])]
                    parameters += [("_revinclude", value) for value in resource.get("searchRevInclude", [])]
                    if parameters:
                        url = f"{portal.open_fhir_url}/{resource['type']}?{urlencode(parameters)}"
                        self.assertEqual(ask(url).status, 200, url)
                    self.assertEqual("search-type" in json.dumps(resource), resource["type"] != "Binary")


class Loading(PortalTest):
    """The control `load`."""
    def test_a_bundle_may_come_in_fhirs_own_media_type(self) -> None:
        fhir = {"Content-Type": "application/fhir+json"}
        got = self.post("/oauth/debug/load", bundle_of(made("Patient/a"), made("Patient/b")), headers=fhir)
        self.assertEqual(got.json, {"stored": 2})

    def test_without_the_sample_patients_only_the_clinician_stays_with_her_resource(self) -> None:
        mine: Any = made("Patient/mine")
        hers = made("Practitioner/smart-clinician", name=[{"text": "Another"}])
        kept = {"db": os.path.join(self.during(tempfile.TemporaryDirectory()), "state.db")}
        for version, data, more, name in (("dstu2", [], {}, "Clara"), ("stu3", [mine], {}, "Clara"),
                ("r4", [mine, hers], {}, "Another"), ("r4", [mine], kept, "Clara"),
                ("r4", [hers], kept, "Another"), ("r4", [], kept, "Another")):
            with self.subTest(version, data=data), s4s.Server(
                    fhir_version=version, data=["none", *data], **more) as portal:
                with self.assertRaisesRegex(s4s.PortalError, "no user .daniel-adams"):
                    portal.issue_token()
                portal.load(mine)
                token = portal.issue_token(username="clinician", patient_id="mine",
                                           scope="openid fhirUser launch/patient")
                url = ask(portal.url + "/oauth/userinfo", token=token).json["fhirUser"]
                self.assertEqual(url, portal.fhir_url + "/Practitioner/smart-clinician")
                self.assertIn(name, ask(url, token=token).text)
                self.assertEqual(ask(portal.open_fhir_url + "/Practitioner?_summary=count").json["total"], 1)


class LoadingRecords(Test):
    """--data, Server(data=...) and Records.load."""
    def setUp(self) -> None:
        self.folder = Path(self.during(tempfile.TemporaryDirectory()))
        self.db = str(self.folder / "state.db")

    def records(self, *data: Any, **settings: Any) -> Any:
        """Records with only this data."""
        return self.with_samples(data=["none", *data], **settings)

    def with_samples(self, **settings: Any) -> Any:
        return self.during(contextlib.closing(s4s.EmbeddedRecords(s4s.Settings(**settings), s4s.Clock())))

    def file(self, name: str, content: str | bytes | dict[str, Any]) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(content, indent=1) if isinstance(content, dict) else content
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    def read(self, records: Any, name: str) -> Any:
        """A resource that was loaded, as Type/id names it."""
        return records.find(*name.split("/")).content

    def dump(self, records: Any) -> list[Any]:
        return [tuple(row) for name in ("resources", "search_values", "unresolved", "before_load")
                for row in records.store.rows(f"SELECT * FROM {name}")]

    def patient(self, key: str, **more: Any) -> dict[str, Any]:
        return made(f"Patient/{key}", **{"name": [{"family": key.title()}], **more})

    def doctor(self, key: str, **identifier: str) -> dict[str, Any]:
        return made(f"Practitioner/{key}", identifier=[identifier or {"value": "7"}])

    def visit(self, doctor: str) -> dict[str, Any]:
        return made("Encounter/v", participant=[{"individual": to(doctor)}])

    def doctor_of(self, records: Any) -> Any:
        return self.read(records, "Encounter/v")["participant"][0]["individual"]["reference"]

    def test_resources_bundles_ndjson_and_gz_in_a_folder_are_loaded(self) -> None:
        self.file("a.json", self.patient("a"))
        self.file("deep/er/b.json", bundle_of(self.patient("b")))
        self.file("c.ndjson", "\n".join(json.dumps(self.patient(key)) for key in ("c", "d")) + "\n\n")
        self.file("e.json.gz", gzip.compress(json.dumps(self.patient("e")).encode()))
        self.file("README.md", "not FHIR")
        records = self.records(str(self.folder))
        self.assertEqual(records.find_patients(), [(key, key.title()) for key in "abcde"])
        self.assertEqual(records.warnings, [])

    def test_references_within_a_bundle_become_type_and_id(self) -> None:
        records = self.records(made("Bundle", type="transaction", entry=[
            {"fullUrl": "urn:uuid:0a", "resource": self.patient("given")},
            {"fullUrl": "urn:uuid:0b", "resource": made("Encounter", subject=to("urn:uuid:0a"))},
            {"fullUrl": "Encounter/draft", "resource": made("Encounter/final")},
            {"fullUrl": "urn:q", "resource": made("Questionnaire/0c", url="urn:q")},
            {"fullUrl": "https://old/fhir/Binary/9", "resource": made("Binary/9")},
            {"request": {"method": "PUT", "url": "DocumentReference/d"}, "resource": made(
                "DocumentReference", subject=to("urn:uuid:0a"), context={
                    "encounter": [to("urn:uuid:0b"), to("Encounter/draft")]},
                content=[{"attachment": {"url": "https://old/fhir/Binary/9"}}])}]))
        self.assertEqual(self.read(records, "Encounter/0b")["subject"], to("Patient/given"))
        self.assertEqual(self.read(records, "Questionnaire/0c")["url"], "urn:q", "its own name")
        document = self.read(records, "DocumentReference/d")
        self.assertEqual(document["context"]["encounter"], [to("Encounter/0b"), to("Encounter/final")])
        self.assertEqual(document["content"][0]["attachment"]["url"], "Binary/9")
        self.assertEqual([pointing.id for pointing in records.pointing_to("9")], ["d"])

    def test_conditional_references_are_resolved_across_files_in_either_order(self) -> None:
        doctor = self.doctor("p", system="http://npi", value="7")
        visit = {**self.visit("Practitioner?identifier=http://npi|7"),
                 "subject": to("Patient?identifier=http://mrn|1")}
        person = self.patient("who", identifier=[{"system": "http://mrn", "value": "1"}])
        for order in ([doctor, visit, person], [person, visit, doctor], [visit, doctor, person]):
            with self.subTest(order=[resource["resourceType"] for resource in order]):
                records = self.records(*order)
                self.assertEqual(self.doctor_of(records), "Practitioner/p")
                self.assertEqual(self.read(records, "Encounter/v")["subject"]["reference"], "Patient/who")
                query = s4s.parse_query("r4", "Encounter", (("patient", "who"), ("participant", "p")))
                self.assertEqual(len(records.search(query, s4s.OPEN_ACCESS).matches), 1)
                self.assertEqual(records.warnings, [])

    def test_absolute_references_mean_what_was_loaded_from_whichever_file_and_in_any_order(self) -> None:
        base = "https://ehr.example/fhir"
        about = {**document("d", "", f"{base}/Binary/b"), "subject": to(f"{base}/Patient/p1")}
        for version, ending in itertools.product(s4s.FHIR_VERSIONS, ("", "/_history/2")):
            resources = {f"{base}/{resource['resourceType']}/{resource['id']}": resource for resource in (
                made("Goal/g", subject=to(f"{base}/Patient/p1{ending}")), made("Patient/p1"), about,
                made("Binary/b"))}
            entries = [{"fullUrl": url, "resource": resource} for url, resource in resources.items()]
            whole, *apart = (made("Bundle", type="searchset", entry=some)
                             for some in (entries, *([entry] for entry in entries)))
            files = [self.file(f"{version}/{resource['resourceType']}.ndjson", json.dumps(resource))
                     for resource in resources.values()]
            for data in ([whole], apart, apart[::-1], files, files[::-1], [str(self.folder / version)]):
                with self.subTest(version=version, data=data), \
                        s4s.Server(data=["none", *data], fhir_version=version) as portal:
                    token = portal.issue_token(username="p1", scope="patient/*.rs")["access_token"]
                    (goal,) = within(ask(f"{portal.fhir_url}/Goal?patient=p1", token=token).json)
                    self.assertEqual(goal["subject"]["reference"], "Patient/p1")
                    records: Any = portal.portal.records
                    self.assertEqual([pointing.id for pointing in records.pointing_to("b")], ["d"])
                    self.assertEqual(records.warnings, [])

    def test_references_that_lead_nowhere_and_canonical_urls_are_kept_and_the_former_counted(self) -> None:
        theirs = [to(text) for text in ("https://other.example/Practitioner/d", "https://other.example/Fax/1",
            "Practitioner?identifier=x|1", "urn:uuid:nobody", "Practitioner/p")]
        named = [{"url": url, "valueCode": "x"} for url in ("https://ehr.example/Patient/a", "urn:oid:1.2")]
        records = self.records(self.patient("a", generalPractitioner=theirs, extension=named))
        self.assertEqual(self.read(records, "Patient/a")["extension"], named)
        self.assertEqual(self.read(records, "Patient/a")["generalPractitioner"], theirs)
        self.assertEqual([warning[:12] for warning in records.warnings], ["4 references"])
        records.load(self.doctor("d"))
        doctors = [to("Practitioner/d"), *theirs[1:]]
        self.assertEqual(self.read(records, "Patient/a")["generalPractitioner"], doctors)

    def test_what_is_in_no_known_patients_record_is_counted_by_type(self) -> None:
        for version in s4s.FHIR_VERSIONS:
            others = [{"resourceType": name, "id": key} for name, key in (("Patient", "a"), ("Goal", "1"),
                ("Goal", "2"), ("Binary", "b"), ("Binary", "lost"), ("Device", "x"))]
            records = self.records(*others, observation("1", "stranger"), document("1", "a", "Binary/b"),
                                   self.doctor("d"), fhir_version=version)
            self.assertEqual(records.warnings, [
                "4 resources belong to no patient who is known: Binary (1), Goal (2), Observation (1)"])

    def test_ndjson_is_known_by_name_or_content_and_an_array_holds_resources(self) -> None:
        a, b = json.dumps(self.patient("a")), json.dumps(self.patient("b"))
        pages = json.dumps([bundle_of(self.patient("a")), self.patient("b")], indent=1)
        for name, text in (
                ("x.ndjson", f"\n \r\n{a}\n{b}"), ("x.json", f"\n\n{a}\n\n{b}\n"), ("x.json", pages),
                ("x.json", f"\n[{a},\n{b}]"), ("x.jsonl", f"[{a}]\n[]\n{b}"), ("x.data", f"{a}\n{b}")):
            empty = [self.file("none.ndjson", ""), self.file("blank.ndjson.gz", gzip.compress(b"\n\n"))]
            with self.subTest(name=name, text=text):
                records = self.records(*empty, self.file(name, text))
                self.assertEqual([key for key, _ in records.find_patients()], ["a", "b"])

    def test_a_folder_is_taken_as_tools_leave_it(self) -> None:
        self.file("in/Patient.ndjson", json.dumps(self.patient("a")))
        for name, content in (
                ("package.json", '{"name": "x"}'), (".index.json", '{"files": []}'), (".x/y.json", "["),
                ("log.ndjson", '{}\n{"event": 1}'), ("._x.json", b"\x00\x05\x16"), ("m.json", "[1]")):
            self.file(f"in/{name}", content)
        if os.name == "posix":
            (self.folder / "in/.#lock.json").symlink_to("nowhere")
            os.mkfifo(self.folder / "in/pipe.json")
            self.assertIn(({}, False), [source[2:] for source in s4s.sources(str(self.folder / "in"))
                                        if source.path.endswith("pipe.json")])
            os.unlink(self.folder / "in/pipe.json")
        else:
            self.file("in/.#lock.json", "nowhere")
        records = self.records(str(self.folder / "in"))
        self.assertEqual(records.find_patients(), [("a", "A")])
        self.assertEqual([warning.partition(" files")[0] for warning in records.warnings], ["7"])

    def test_types_that_are_not_served_are_left_out_and_counted_and_not_judged_otherwise(self) -> None:
        for more in ({}, {"id": "x" * 67}, {"id": 5}, {"meta": 5}, {"x": float("nan")}):
            left: Any = made("SearchParameter", **more)
            for data in (left, bundle_of(left)):
                with self.subTest(more=more):
                    records = self.records(self.patient("a"), data)
                    self.assertEqual((len(records.find_patients()), records.warnings), (1, [
                        "1 resources of types that are not served were left out: SearchParameter (1)"]))
        self.records(made("ExplanationOfBenefit", insurance={}), fhir_version="dstu2")

    def test_a_value_of_a_wrong_type_is_named_with_what_was_expected(self) -> None:
        wrong: list[tuple[Any, str]] = [({"meta": 1}, "meta: expected an object")]
        values: list[Any] = [1, ["a"], {}, "a b"]
        for moment in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "today"):
            wrong.append(({"meta": {"lastUpdated": moment}}, "meta.lastUpdated: expected a time such as"))
        for value in values:
            wrong += [({"id": value}, "id: expected a string of 1 to 64"),
                      ({"meta": {"versionId": value}}, "meta.versionId: expected a string of 1 to 64"),
                      ({"meta": {"lastUpdated": value}}, "meta.lastUpdated: expected a time such as")]
        for more, words in wrong:
            with self.subTest(more=more), self.assertRaisesRegex(s4s.PortalError, f": {re.escape(words)}"):
                self.records().load(made("Patient/a", **more))

    def test_an_ambiguous_conditional_reference_stays_and_one_to_what_reset_took_away(self) -> None:
        for npi, search in (({}, "7"), ({"system": "http://npi", "value": "7"}, "http://npi|7")):
            theirs = f"Practitioner?identifier={search}"
            records = self.records(self.doctor("p", **npi), self.doctor("q", **npi), self.visit(theirs))
            self.assertEqual(self.doctor_of(records), theirs)
        records = self.records()
        records.load(self.doctor("p", system="http://npi", value="7"))
        records.reset()
        records.load(self.visit("Practitioner?identifier=http://npi|7"))
        self.assertEqual(self.doctor_of(records), "Practitioner?identifier=http://npi|7")

    def test_a_provenance_is_placed_by_its_targets_whenever_they_come(self) -> None:
        targets = [observation("1", "a"), observation("2", "b"), self.doctor("d"), self.patient("a")]
        abouts = [made(f"Provenance/p{place}", target=[
            to(name) for name in names.split()]) for place, names in enumerate((
                "Observation/1", "Observation/1/_history/3 Practitioner/d Patient/a",
                "Observation/1 Observation/2", "Practitioner/d", "Observation/1 Observation/3",
                "urn:uuid:2", "", "Provenance/p0"))]  # of the last nobody could keep track

        def owners() -> str:
            return "".join(records.find("Provenance", f"p{place}").owner for place in range(len(abouts)))
        for given, loaded in (([*abouts, *targets], []), (targets, abouts), (abouts, targets)):
            with self.subTest(given=len(given)):
                records = self.records(*given)
                records.load(bundle_of(*loaded))
                self.assertEqual(owners(), "aa???b??")
        # What they are about may come to be another's, and be taken back.
        records.load(observation("1", "b"))
        self.assertEqual(owners(), "b?b??b??")
        records.reset()
        self.assertEqual(owners(), "?" * len(abouts))

    def test_an_address_that_only_ends_like_a_reference_places_and_opens_nothing(self) -> None:
        viewer = "https://viewer.example/show?file=/"
        records = self.records(self.patient("a"), made("Binary/x"), document("d", "a", f"{viewer}Binary/x"),
            observation("o") | {"subject": to(f"{viewer}Patient/a")},
            observation("n", "a", extension=[{"valueX": made("Patient/b")}]))
        self.assertEqual([records.find("Observation", name).owner for name in "on"], ["?", "?"])
        self.assertEqual(records.pointing_to("x"), [])

    def test_loading_twice_gives_the_same_records_once(self) -> None:
        ill = made("Condition", subject=to("urn:uuid:0a"))
        given = bundle_of(self.patient("a"), ill, self.visit("Practitioner?identifier=7"), self.doctor("p"))
        given["entry"][0]["fullUrl"] = "urn:uuid:0a"
        before = self.dump(self.with_samples(data=[given], db=self.db))
        for more in ([given, given], []):
            again = self.with_samples(data=more, db=self.db)
            self.assertEqual((len(again.find_patients()), self.dump(again)), (4, before))

    def test_a_changed_resource_gets_the_next_version(self) -> None:
        records = self.records(self.patient("a"))
        for change, version in (({"gender": "female"}, "2"), ({"meta": {"versionId": "9"}}, "9")):
            records.load(self.patient("a", **change))
            self.assertEqual(self.read(records, "Patient/a")["meta"]["versionId"], version)

    def test_a_bad_file_is_named_with_the_place_and_the_reason(self) -> None:
        good = json.dumps(self.patient("a"))
        for name, content, *words in (("cut.json", good[:-5], "not JSON", "line 1 column"),
                ("lines.json", '{\n "resourceType": "Patient",\n "id": 1,}', "line 3"),
                ("list.json", f"[{good}, 5]", "[1]", "resourceType"), ("empty.json", "", "not JSON"),
                ("scalar.json", "null", "resourceType"), ("package.json", '{"name": "x"}', "resourceType"),
                ("first.ndjson", f"\n{good[:9]}\n{good}", "line 2"),
                ("id.json", '{"resourceType": "Patient", "id": "a b"}', '"a b"'),
                ("third.ndjson", f"{good}\n\n{good[:9]}", "line 3"),
                ("nan.json", '{"resourceType": "Patient", "id": "a", "x": NaN}', "JSON"),
                ("lone.json", '{"resourceType": "Patient", "id": "\\ud800"}', "id"),
                ("text.json", '{"resourceType": "Patient", "id": "a", "x": "\\ud800"}', "surrogates"),
                ("deep.json", '{"resourceType": "Patient", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "JSON"),
                ("latin.json", b'{"resourceType": "Patient", "id": "\xe9"}', "utf-8"),
                ("time.json", '{"resourceType": "Patient", "meta": {"lastUpdated": "today"}}', "today"),
                ("entry.json", bundle_of(self.patient("a"), {}),
                 "Bundle.entry[1]"), ("history.json", made("Bundle", type="history"), "transaction"),
                ("x.json.gz", b"no gzip", "gzip")):
            with self.subTest(name=name), self.assertRaises(s4s.StartError) as caught:
                self.records(self.file(name, content))
            for word in (name, *words):
                self.assertIn(word, str(caught.exception))
            self.assertNotIn("\n", str(caught.exception))
        self.file("nothing/here.txt", "")
        for name in ("absent", "nothing"):
            with self.subTest(name=name), self.assertRaises(s4s.StartError):
                self.records(str(self.folder / name))

    def test_what_was_loaded_before_a_bad_file_stays(self) -> None:
        lines = json.dumps(self.patient("b")) + "\n{}"
        with self.assertRaises(s4s.StartError):
            self.records(self.patient("a"), self.file("b.ndjson", lines), db=self.db)
        self.assertEqual(self.records(db=self.db).find_patients(), [("a", "A")])

    def test_data_of_another_version_is_noticed(self) -> None:
        cases: Any = (("r4", "MedicationOrder", {}), ("stu3", "MedicationOrder", {}),
                ("r4", "Condition", {"clinicalStatus": "active"}), ("dstu2", "Observation", {"category": []}),
                ("stu3", "Condition", {"clinicalStatus": {}}), ("r4", "Observation", {"category": {}}),
                ("r4", "Patient", {"name": [{"family": []}]}), ("dstu2", "Patient", {"name": {"family": ""}}),
                ("stu3", "Immunization", {"occurrenceDateTime": "2008"}),
                ("r4", "Questionnaire", {"group": {}}), ("dstu2", "Questionnaire", {"item": []}),
                ("stu3", "QuestionnaireResponse", {"questionnaire": ""}),
                *((version, name, {element: {}}) for version, element, names in (
                    ("dstu2", "subject", f"{MOVED} ReferralRequest ImagingStudy"),
                    ("stu3", "patient", f"{MOVED} ReferralRequest"),
                    ("stu3", "subject", "ImagingStudy MeasureReport")) for name in names.split()))
        for version, type_name, elements in cases:
            with self.subTest(version=version, type=type_name), \
                    self.assertRaisesRegex(s4s.StartError, "--fhir-version"):
                self.records({"resourceType": type_name, **elements}, fhir_version=version)

    def test_a_database_of_another_version_is_refused(self) -> None:
        self.records(db=self.db).store.close()
        with self.assertRaisesRegex(s4s.StartError, "--fhir-version r4"):
            self.records(db=self.db, fhir_version="stu3")
        with self.assertRaises(s4s.StartError):
            s4s.Settings(fhir_version="r5")

    def test_load_is_all_or_nothing(self) -> None:
        records = self.records()
        deep: Any = []
        for _ in range(100_000):
            deep = [deep]
        for bad in ({}, made("AuditEvent"), made("Patient", x={1, 2}), made("Patient", x=deep),
                    bundle_of(self.patient("a"), 5)):
            with self.subTest(bad=bad), self.assertRaises(s4s.PortalError):
                records.load(bad)
        self.assertEqual(records.find_patients(), [])
        self.assertEqual(records.load(bundle_of(self.patient("a"), self.patient("b"))), 2)

    def test_a_resource_without_an_id_gets_one_from_its_content(self) -> None:
        records = self.records()
        for key in ({}, {"id": None}) * 2:
            records.load(made("Patient", gender="male", **key))
        self.assertEqual([len(key) for key, _ in records.find_patients()], [32, 32])

    def test_reset_brings_back_exactly_what_was_there_at_the_start(self) -> None:
        visit = self.visit("Practitioner?identifier=http://npi%7C7")
        records = self.with_samples(data=[self.patient("a"), visit])
        before = self.dump(records)
        records.load({**visit, "status": "planned"})
        records.load(self.doctor("p", system="http://npi", value="7"))
        self.assertEqual(self.doctor_of(records), "Practitioner/p")
        records.load(self.patient("a", gender="male"))
        records.load(self.patient("a", gender="female"))
        records.load(self.patient(DANIEL))
        self.assertNotEqual(self.dump(records), before)
        records.reset()
        self.assertEqual(self.dump(records), before)

    def test_patients_are_found_by_parts_of_their_names_or_by_id(self) -> None:
        records = self.records(*(self.patient(f"p{number}", name=[
            {"family": f"M\u00fcller{number}", "given": ["Ada"]}]) for number in range(5)))
        for text, number in (("ULLER3", 3), ("ada muller4", 4), ("P2", 2)):
            self.assertEqual(records.find_patients(text), [(f"p{number}", f"Ada M\u00fcller{number}")])
        self.assertEqual((len(records.find_patients("ada")), len(records.find_patients(limit=2))), (5, 2))

    def test_the_first_question_counts_the_samples_and_readers_go_on_while_records_are_loaded(self) -> None:
        records, query = self.with_samples(), s4s.parse_query("r4", "Patient", (("_count", "0"),))
        big = bundle_of(*(self.patient(f"p{number}") for number in range(300)))
        self.assertEqual(records.search(query, s4s.OPEN_ACCESS).total, 3)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            loads = [pool.submit(records.load, big) for _ in range(4)]
            while not all(load.done() for load in loads):
                self.assertIn(records.search(query, s4s.OPEN_ACCESS).total, (3, 303))
        self.assertEqual([load.result() for load in loads], [300] * 4)

    def test_a_long_load_shows_progress(self) -> None:
        clock, shown = s4s.Clock(), io.StringIO()
        progress = s4s.Progress(3_000_000, clock)
        with contextlib.redirect_stderr(shown):
            for read, seconds in ((500_000, 2), (1_000_000, 0), (1_100_000, 0)):
                progress.at(read)
                clock.advance(seconds)
        self.assertRegex(shown.getvalue(), r"\Aloading: 1 of 3 MB, \d+ MB/s, 4 s left\n\Z")

    def test_a_patients_search_uses_the_index_of_the_patients(self) -> None:
        records = self.with_samples()
        query = s4s.parse_query("r4", "Observation", (("category", "laboratory"), ("patient", DANIEL)))
        where = s4s.search_condition(query, frozenset([DANIEL]))
        plan = "\n".join(row["detail"] for row in records._filled().rows(
            f"EXPLAIN QUERY PLAN SELECT r.json FROM resources r WHERE {where.sql}", *where.values))
        self.assertIn("resources_by_patient (type=? AND patient_id=?", plan)
        self.assertNotIn("SCAN", plan)


# ######################################################################## 19 a FHIR server behind

class NoAddressGetsOut(ForwardingTest):
    """Whatever the FHIR server calls itself, apps see the portal's address."""
    def clean(self, path: str, **more: Any) -> str:
        """An answer in which nothing of the FHIR server's address is left."""
        body = json.dumps(self.read(path, **more))
        self.assertNotIn(str(self.behind.port), body)
        self.assertNotIn("hidden.example", body)
        return body

    def spelled(self, text: str) -> dict[str, Any]:
        """What comes of an Observation with this text in it."""
        self.script("Observation/mine",
                    json.dumps(observation("mine", note="NOTE")).replace("NOTE", text).encode())
        return dict(json.loads(self.clean("Observation/mine")))

    OURS: ClassVar[str] = "https://portal.example/api/fhir"

    def shows(self, base: str, *cases: tuple[str, str]) -> None:
        """What comes of texts from a FHIR server at `base`; "" if nothing should."""
        upstream = s4s.Upstream(s4s.Settings(fhir_server=base), s4s.OpenSockets())
        for text, expected in cases:
            with self.subTest(text, base=base):
                self.assertEqual(upstream.rewritten(f'"{text}"'.encode(), self.OURS), f'"{expected or text}"')

    def test_every_spelling_of_the_base_and_other_paths_of_its_host(self) -> None:
        person, near = f"{self.OURS}/Patient/1", "http://127.0.0.1:9/fhir"
        theirs, gone = quote(near, safe=""), "fhir-server.invalid"
        self.shows(
            near, *((f"http://{host}:9/fhir/Patient/1", person) for host in (
                "127.0.0.1", "127.1", "2130706433", "0x7F000001", "0177.0.0.1", "127.8.9.1", "0.0.0.0",
                "localhost", "localhost.", "[::]", "[::1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
                "[::FFFF:7f00:1]")),
            (r"http:\/\/LocalHost:9\/fhir\/Patient\/1", self.OURS + r"\/Patient\/1"),
            (r"http:\u002f\u002f127.0.0.1\u003a9/fhir/Patient/1", person),
            *((f"urn:x?base={there}", f"urn:x?base={quote(self.OURS, safe='')}") for there in (
                theirs, theirs.lower(), *(theirs.replace("127.0.0.1", quote(host)) for host in (
                    "[::1]", "[::ffff:127.0.0.1]", "127.1")))),
            *((text.format(url), text.format(gone)) for text, url in (
                ("http://{}/admin", "127.0.0.1:9"), ("HTTP://{}/FHIR", "LOCALHOST:9"),
                ("see {}", "localhost:9"), ("http%3a%2f%2f{}%2f", "localhost%3a9"),
                ("http://{}/fhir2", "127.0.0.1:9"), ("see {}", "2130706433:9"), ("ftp://{}/", "[0::1]:9"))),
            ("http://127.0.0.1:99/fhir", ""), ("http://10.0.0.1:9/fhir", ""))

    def test_servers_elsewhere_and_on_usual_ports(self) -> None:
        ours, person, gone = self.OURS, f"{self.OURS}/Patient/1", "fhir-server.invalid"
        cases: dict[str, Any] = {
            "https://fhir.example": (
                ("https://fhir.example/Patient/1", person), ("http://FHIR.example:80/Patient/1", person),
                ("https://fhir.example", ours)),
            "https://fhir.example/r4": (
                ("ftp://fhir.example:8443/x", f"ftp://{gone}/x"), ("https://myfhir.example/r4/", ""),
                ("https://fhir.example.org/", f"https://{gone}.org/")),
            "http://portal.example:9/r4": [("http://portal.example:9/r4/Patient/1", person)],
            "http://localhost/r4": (
                ("http://127.0.0.1/r4/Patient/1", person), ("http://localhost:8080/r4/", ""),
                ("http://localhost/admin", f"http://{gone}/admin"), ("http://127.1/r4/Patient/1", person),
                ("http://[0::1]:80/admin", f"http://{gone}/admin"), ("2130706433 or localhost", ""),
                ("http://127.0.0.1.example/r4/", ""), ("Patient/0", "")),
            "http://fhir:8080/fhir": (
                ("http://FHIR:8080/fhir/Patient/1", person), ("http://hl7.org/fhir/us/core", ""),
                ("FHIR, http://fhir.org/fhir", ""), ("http://hapi-fhir:8080/fhir", ""),
                ("http://fhir:8080/x", f"http://{gone}/x"), ("ftp://FHIR:9/x", f"ftp://{gone}/x"),
                ("see //fhir.", f"see //{gone}."), ("at fhir:08080, fhir%3a8080", f"at {gone}, {gone}"),
                (r"ftp:\/\/fhir\/x", rf"ftp:\/\/{gone}\/x"),
                ("a=ftp%3A%2F%2Ffhir%2Fx", f"a=ftp%3A%2F%2F{gone}%2Fx")),
            "http://server": [("a server: http://server:80/Patient/1", f"a server: {person}")],
            "http://server/r4": [("server:443, http://Server", f"{gone}, http://{gone}")],
            "http://127.1:9/r4": (("http://localhost:9/r4/Patient/1", person),
                                  ("http://10.0.0.1:9/r4/Patient/1", ""), ("http://[fe80::1]:9/r4/", ""))}
        for base, texts in cases.items():
            self.shows(base, *texts)

    def test_links_full_urls_and_attachments_are_of_the_api_that_was_asked(self) -> None:
        for ours, how in ((self.portal.fhir_url, {}), (self.portal.open_fhir_url, OPENLY)):
            bundle = json.loads(self.clean("DocumentReference", **how))
            entries = {entry["fullUrl"]: entry["resource"] for entry in bundle["entry"]}
            attachment = entries[f"{ours}/DocumentReference/my-doc"]["content"][0]["attachment"]
            self.assertEqual(attachment["url"], f"{ours}/Binary/my-file")
            self.assertEqual(bundle["link"], [{"relation": "self", "url": f"{ours}/DocumentReference"}])

    def test_another_name_that_the_server_goes_by(self) -> None:
        there, ours = "http://hidden.example/r4/", self.portal.fhir_url
        record = observation("mine", note=f"{there}Patient/1")
        bundle = json.dumps(self.behind.bundle(record, self=f"{there}Observation"))
        self.script("Observation", bundle.replace(self.behind.url + "/", there).encode())
        self.assertIn(f'"{ours}/Patient/1"', self.clean("Observation"))
        self.script("Observation/mine", record)
        self.assertEqual(json.loads(self.clean("Observation/mine"))["note"], f"{ours}/Patient/1")
        self.portal.reset()
        self.assertEqual(self.upstream.names, [])

    def test_the_name_that_its_metadata_tells_is_hidden_from_the_first_read_on(self) -> None:
        there, ours = "http://hidden.example/r4", self.portal.fhir_url
        wrong: tuple[Any, ...] = (7, None, "x", "http://[", "http://h:x/", "http://user@h/", {"a": ["b"]},
                                  "http://[1:2:3]:5/x")
        for name in (there, there + "/", "HTTP://hidden.example/r4", *wrong):
            self.script("metadata", {**WhatIsBehind.STATEMENT, "implementation": {"url": name}})
            for text, expected in (("x", "x"),) if name in wrong else (
                    (f"{there}/Patient/1", f"{ours}/Patient/1"), (f"see {there}", f"see {ours}"),
                    (f"urn:x?base={quote(there, safe='')}", f"urn:x?base={quote(ours, safe='')}"),
                    ("http://hidden.example/admin", "http://fhir-server.invalid/admin"),
                    ("HIDDEN.example:9", "fhir-server.invalid")):
                with self.subTest(text, name=name):
                    self.portal.reset()
                    self.token = self.issue(self.scope)
                    self.assertEqual(self.spelled(text)["note"], expected)

    def test_while_one_name_is_learned_others_stay_hidden_and_are_learned(self) -> None:
        is_near, reads, notes = s4s.is_this_machine, [1], list[str]()
        self.script("Observation/mine",
                    observation("mine", note=f"http://localhost:{self.behind.port}/fhir/Patient/1"))
        for name, host in (("Condition", "hidden.example"), ("Goal", "hidden.example.net")):
            self.script(name, self.behind.bundle(self=f"http://{host}/r4/{name}"))
        goal = threading.Thread(target=self.ids, args=("Goal",))

        def meanwhile(host: str) -> bool:
            if reads and reads.pop():
                notes.append(self.read("Observation/mine")["note"])
                goal.start()
                goal.join(0.2)  # it can't be learned now, or the other would replace it
            return bool(is_near(host))
        with mock.patch.object(s4s, "is_this_machine", meanwhile):
            self.ids("Condition")
            goal.join()
        self.assertEqual(notes, [f"{self.portal.fhir_url}/Patient/1"])
        self.assertEqual(self.spelled("http://hidden.example/r4 http://hidden.example.net/r4")["note"],
                         f"{self.portal.fhir_url} {self.portal.fhir_url}")

    def test_neither_a_resource_nor_a_link_to_what_cannot_be_teaches_a_name(self) -> None:
        told = json.dumps(self.behind.bundle(observation("mine", note="http://loinc.org/1")))
        self.script("Observation", told.replace(self.behind.url, "http://loinc.org").encode())
        self.assertEqual(self.read("Observation")["entry"][0]["resource"]["note"], "http://loinc.org/1")
        for _ in range(2):
            self.script("Observation", [observation("mine", note=self.behind.url)],
                        self="http://[1:2:3]:5/x/Observation")
            self.assertIn("mine", self.clean("Observation"))

    def test_decimals_come_through_as_they_were(self) -> None:
        bundle = self.behind.bundle(observation("mine", value="VALUE"), observation("theirs", OTHER))
        self.script("Observation", json.dumps(bundle).replace('"VALUE"', '{"value": 1.10}').encode())
        for query in ("", "_elements=value", "_summary=data", "_pretty=true"):
            self.assertRegex(self.get(f"Observation?{query}").text, r'"value": {\s*"value": 1\.10\s*}')


class Paging(ForwardingTest):
    """Links to further pages are the portal's own."""
    def setUp(self) -> None:
        super().setUp()
        self.link(f"{self.behind.url}?_getpages=abc&_offset=1")

    def link(self, *links: str) -> None:
        """Pages of one Observation each, with these links to the next."""
        for number, link in enumerate((*links, "")):
            self.script(f"/fhir?_getpages=abc&_offset={number}" if number else "Observation", [
                observation(f"o{number}"), observation("theirs", OTHER)], next=link)

    def next_link(self, path: str, **more: Any) -> str:
        """The path of the link to the next page, which is the portal's own."""
        before, _, path = next_of(self.read(path, **more)).partition(more.get("api", "/api/fhir/"))
        self.assertEqual(before, self.portal.url)
        return path

    def test_to_the_last_page_by_links_without_a_type_relative_ones_and_other_names(self) -> None:
        url, query = self.behind.url, "?_getpages=abc&_offset="
        for bases in ([url] * 3, ["/fhir", url.replace("127.0.0.1", "localhost"), "https://hidden.example/fhir"]):
            self.link(*(f"{base}{query}{number}" for number, base in enumerate(bases, 1)))
            found = map(ids_within, pages_from(f"{self.portal.fhir_url}/Observation?_count=1", self.token))
            self.assertEqual([*found], [[f"o{number}"] for number in range(4)])

    def test_through_my_compartment_everything_of_mine_and_a_posted_search(self) -> None:
        for path, how in ((f"Patient/{ME}/Observation?_count=1", {}), (f"Patient/{ME}/$everything", {}),
                          ("Observation/_search", {"form": {"code": "x"}})):
            with self.subTest(path):
                self.behind.script[path] = self.behind.script["Observation"]
                self.assertEqual(self.ids(self.next_link(path, **how)), ["o1"])

    def test_self_names_what_the_server_used_of_a_lenient_search(self) -> None:
        used, lenient = "code=x&_include=Observation:subject", {"Prefer": "handling=lenient"}
        path = f"Observation?{used}&colour=red&_include=Observation:colour"
        for query, headers, named in ((f"?{used}", lenient, f"Observation?{used}"), (f"?{used}", {}, path),
                                      ("", lenient, path)):
            self.script("Observation", self.behind.bundle(self=f"{self.behind.url}/Observation{query}"))
            got = self.read(path, headers=headers)["link"][0]["url"]
            self.assertEqual(got, f"{self.portal.fhir_url}/{named}")

    def test_a_link_tells_nothing_of_the_address_and_is_of_no_use_elsewhere(self) -> None:
        link = self.next_link("Observation")
        self.assertRegex(link, r"^Observation\?_page=[\w-]{22}$")
        self.behind.seen.clear()
        self.assert_not_forwarded(link, token=self.issue(self.scope))
        self.assert_refused(link, **OPENLY)
        self.assert_refused(link.replace("Observation", "Patient"))
        self.assert_refused(f"{link}&patient={OTHER}", 400)
        self.assertEqual(self.ids(link), ["o1"])
        link = self.next_link("Observation", **OPENLY)
        self.assertEqual(self.ids(link, **OPENLY), ["o1", "theirs"])
        self.assert_refused(link)

    def test_a_link_expires(self) -> None:
        link, expires = self.next_link("Observation"), s4s.PAGE_SECONDS
        self.addCleanup(self.portal.advance, -expires)
        self.portal.advance(expires)
        self.assert_refused(link, 404, token=self.issue(self.scope))
        self.read("Observation", token=self.issue(self.scope))
        [_] = self.portal.portal.state.rows("SELECT * FROM pages")  # the expired one is gone

    def test_links_are_bounded_in_number(self) -> None:
        with mock.patch.object(s4s, "MAX_LINKS", 2):
            links = [self.next_link("Observation") for _ in range(3)]
            self.assertEqual([self.get(link).status for link in links], [404, 200, 200])

    def test_a_link_that_leads_elsewhere(self) -> None:
        for link in ("https://hidden.example/other?page=2", "/fhir/../admin", "/fhir/%2e%2e/admin", "//[",
                     "file:///etc/passwd", "/fhirs", "/fhir//x", "/fhir?x=\ud800", "/fhir/\ud800"):
            with self.subTest(link):
                self.link(link)
                self.assert_refused("Observation", 502)

    def test_a_portal_behind_a_portal(self) -> None:
        with s4s.Server() as back, s4s.Server(fhir_server=back.open_fhir_url, open_fhir=True) as front:
            token = front.issue_token(scope="patient/*.rs")["access_token"]
            found = [key for page in pages_from(f"{front.fhir_url}/Observation?_count=50", token)
                     for key in ids_within(page)]
            self.assertEqual(len(found), len(set(found)))
            self.assertGreater(len(found), 100)
            visit = ids_within(ask(f"{back.open_fhir_url}/Encounter?patient={ME}").json)[0]
            at_it = [ids_within(ask(f"{url}/Observation?encounter={url}/Encounter/{visit}", token=token).json)
                     for url in (back.open_fhir_url, front.open_fhir_url, front.fhir_url)]
            self.assertTrue(at_it[0])
            self.assertEqual(at_it, [at_it[0]] * 3)


class Faults(ForwardingTest):
    """What may go wrong behind the portal, and what the app is told of it."""
    def test_a_status_is_passed_on_without_the_servers_words(self) -> None:
        outcome = made("OperationOutcome", text=self.behind.url)
        for why, statuses, told in (("busy", (503, 429), 0), ("absent or deleted", (404, 410), 404),
                                    ("not accepted", (400, 422), 400),
                                    ("its own troubles", (401, 403, 500, 502, 418, 206, 202), 502)):
            for status in statuses:
                with self.subTest(why, status=status):
                    self.script("Observation/mine", outcome, status, {"Retry-After": "7"})
                    self.assert_refused("Observation/mine", told or status)
                    wait = self.get("Observation/mine").headers.get("retry-after")
                    self.assertEqual(wait, "7" if why == "busy" else None)
        self.script("Observation", b"{}", 422)
        self.assert_refused("Observation?unheard=of", 400)

    def test_why_it_refused_is_told_to_the_log_alone_and_without_our_credentials(self) -> None:
        issues = [{"diagnostics": f"no x at {self.behind.url}"}, {"details": {"text": "key swordfish"}}]
        outcome, told = {"issue": issues}, f"it says: no x at {self.behind.url}; key [redacted]"
        settings: dict[str, Any] = {**self.settings, "verbose": True}
        with s4s.Server(**settings) as portal:
            token, lines = portal.issue_token(scope="patient/*.rs")["access_token"], log_of(portal)
            for status, body, words in (
                    *((status, outcome, True) for status in (400, 422, 500, 401)), (400, b"<html>", False),
                    (400, {"issue": [[{}], {"diagnostics": {}}]}, False), (400, b"[" * 100_000, False)):
                with self.subTest(status, body=str(body)[:50]):
                    self.script("Observation", body, status)
                    got = ask(portal.fhir_url + "/Observation", token=token)
                    self.assertEqual(got.status, 400 if status in (400, 422) else 502)
                    self.assertNotRegex(got.text, f"no x|{self.behind.port}")
                    self.assertEqual((told in lines[-1], "swordfish" in lines[-1]), (words, False), lines)
            self.script("Observation", {"issue": [{"diagnostics": f"{token} " * 100}]}, 400)
            ask(portal.fhir_url + "/Observation", token=token)
            self.assertIn("it says: [redacted] [", lines[-1])
            self.assertNotIn(token[:8], lines[-1], "nor a part of it")

    def test_answers_that_are_no_fhir_are_502(self) -> None:
        mine = json.dumps(observation("mine"))
        for name, body in {"HTML": b"<html>", "empty": b"", "array": b"[]", "null": b"null", "no type": b"{}",
                "cut": mine[:-2].encode(), "control": mine.replace("final", "\0").encode(),
                "NaN": mine.replace('"final"', "NaN").encode(), "twice": (mine + mine).encode(),
                "two byte order marks": 2 * b"\xef\xbb\xbf" + mine.encode(), "UTF-16": mine.encode("utf-16"),
                "no UTF-8": mine.replace("final", "\xff").encode("latin-1"), "deep": b'{"a":' * 100_000,
                "outcome": b'{"resourceType": "OperationOutcome"}'}.items():
            with self.subTest(name):
                self.script("Observation/mine", body)
                self.assert_refused("Observation/mine", 502)
        head = b'{"resourceType": "Bundle", "type": "searchset"'
        for body in (b"", b"{", b"[]", b'{"resourceType": "Bundle"}',
                     head.replace(b"searchset", b"batch") + b"}", *(head + rest for rest in (
                         b', "entry": [}', b', "entry": {}}', b', "entry": [1 2]}', b"} {}", b', "x" 1}',
                         b", 1: 2}", b", [1]: 2}", b""))):
            with self.subTest(body):
                self.script("Observation", body)
                self.assert_refused("Observation", 502)
        good = gzip.compress(mine.encode())
        for body in (b"{}", good[:-5], good + b"x", good + good[:-5], 100 * gzip.compress(b" ") + good):
            self.script("Observation/mine", body, 200, {"Content-Encoding": "gzip"})
            self.assert_refused("Observation/mine", 502)

    def test_broken_http_and_none_are_502(self) -> None:
        mine, ok = json.dumps(observation("mine")).encode(), b"HTTP/1.1 200 OK\r\n"
        for name, data in {"silence": b"", "no HTTP": b"SSH-2.0\r\n\r\n", "no header's end": ok + b"A: b\r\n",
                "bad header": ok + b"A b\r\n\r\n", "cut off": ok + b"Content-Length: 9\r\n\r\n{",
                "two ends": ok + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"%x\r\n%s\r\n0\r\n\r\n" % (len(mine), mine),
                "two lengths": ok + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
                "bad length": ok + b"Content-Length: -1\r\n\r\n",
                "bad chunk": ok + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                "unknown coding": ok + b"Content-Encoding: br\r\nContent-Length: 2\r\n\r\n{}",
                "huge": ok + b"Content-Length: 99999999999\r\n\r\n",
                "huge header": ok + b"A: " + b"b" * s4s.MAX_HEAD}.items():
            with self.subTest(name):
                self.behind.script["Observation/mine"] = data
                self.assert_refused("Observation/mine", 502)
        with mock.patch.object(self.upstream, "port", 1):
            self.upstream.close()
            self.assert_refused("Observation/mine", 502)

    def test_an_answer_too_large_is_502(self) -> None:
        with mock.patch.object(s4s, "MAX_ANSWER", 1000):
            large = json.dumps(observation("mine", note="x" * 1000)).encode()
            for name, headers, body in (("length", {}, large),
                    ("to the end", {"Content-Length": "", "Connection": "close"}, large),
                    ("bomb", {"Content-Encoding": "gzip"}, gzip.compress(large)),
                    ("bomb in parts", {"Content-Encoding": "gzip"},
                     gzip.compress(large[:600]) + gzip.compress(large[600:]))):
                with self.subTest(name):
                    self.script("Observation/mine", body, 200, headers)
                    self.upstream.close()  # connections keep the limit of before
                    self.assert_refused("Observation/mine", 502)

    def test_gzip_in_parts_chunks_interim_answers_and_a_byte_order_mark_are_understood(self) -> None:
        text = b"\xef\xbb\xbf" + json.dumps(observation("mine")).encode()
        body = gzip.compress(text[:2]) + gzip.compress(b"") + gzip.compress(text[2:])
        self.behind.script["Observation/mine"] = (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n" + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (
                body[:20], body[20:])) + b"0\r\nTrailer: x\r\n\r\n")
        self.assertEqual(self.get("Observation/mine").body, text[3:])

    def test_too_slow_is_504_also_byte_by_byte_and_floods_end(self) -> None:
        ok, interim = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
        for drip, then, wait, seconds, status in ((b"", b"", 0.02, 0.1, 504), (b"H", b"x", 0.02, 0.1, 504),
                (ok + b"Content-Length: 9\r\n\r\n", b"x", 0.02, 0.1, 504),
                (interim, interim * 1000, 0, 10, 502),
                (ok + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 1000, 0, 0.1, 504)):
            with self.subTest(drip), socket.create_server(("127.0.0.1", 0)) as slow:
                self.assertEqual(self.status_of(slow, drip, then, wait, seconds), status)

    def status_of(self, slow: socket.socket, drip: bytes, then: bytes, wait: float, seconds: float) -> int:
        """What the portal answers in front of a server that sends `drip`, then some every now and then."""
        url = f"http://127.0.0.1:{slow.getsockname()[1]}"
        portal = s4s.Portal(s4s.Settings(fhir_server=url, fhir_timeout=seconds, open_fhir=True))
        self.addCleanup(portal.close)
        cast(s4s.ForwardedRecords, portal.records)._version = "r4", math.inf
        request = s4s.Request("GET", "/api/open-fhir/Patient/1", {"host": "127.0.0.1"})
        answers: list[s4s.Response] = []
        asking = threading.Thread(target=lambda: answers.append(s4s.dispatch(portal, request)))
        asking.start()
        with slow.accept()[0] as connection:
            connection.sendall(drip)
            while asking.is_alive():
                with contextlib.suppress(OSError):
                    connection.sendall(then)
                asking.join(wait)
        return answers[0].status

    def test_redirects_stay_within_the_fhir_server(self) -> None:
        self.script("Observation/1", b"", 302, {"Location": "/fhir/Observation/2"})
        self.script("Observation/2", observation("1"))
        self.assertEqual(self.read("Observation/1")["id"], "1")
        for place in ("http://hidden.example/", "/elsewhere", "/fhir/../x", "/fhir/Observation/1", ""):
            with self.subTest(place):
                self.script("Observation/1", b"", 302, {"Location": place})
                self.assert_refused("Observation/1", 502)

    def test_a_posted_search_keeps_what_it_asks_for_in_a_redirect_or_ends_in_words(self) -> None:
        for status in (301, 302, 303, 307, 308):
            with self.subTest(status):
                self.script("Observation/_search", b"", status, {"Location": "/fhir/Observation/_search/"})
                self.script("Observation/_search/", [observation("mine")])
                self.behind.seen.clear()
                if status < 307:
                    self.assert_refused("Observation/_search", 502, "redirects a posted search",
                                        form={"code": "x"})
                    self.assertEqual(len(self.behind.seen), 1)
                else:
                    self.assertEqual(self.ids("Observation/_search", form={"code": "x"}), ["mine"])
                    (_, first, body), (_, then, sent) = self.behind.seen
                    self.assertEqual((then, sent), (first, f"code=x&patient=Patient/{ME}".encode()))
                    self.assertEqual((then[":method"], sent), ("POST", body))


class Transport(ForwardingTest):
    """What travels, and over which connections."""
    def test_a_connection_on_which_something_came_unasked_is_not_used_again(self) -> None:
        self.behind.records["Observation/second"] = observation("second")
        self.behind.keeps_open = True
        upstream: Any = self.upstream

        def answer(status: str, text: str, announced: bool = True) -> bytes:
            length = f"Content-Length: {len(text)}\r\n" if announced else ""
            return f"HTTP/1.1 {status}\r\n{length}\r\n{text}".encode()
        mine, other = (answer("200 OK", json.dumps(observation(name))) for name in ("mine", "third"))
        for why, sent, later in (("an answer too many", mine + other, b""),
                ("an answer too many, that comes later", mine, other),
                ("a 408 to nothing", mine, answer("408 Request Timeout", "")), ("one byte", mine + b"x", b""),
                ("a 304 with a body", answer("304 Not Modified", "{}", announced=False), b""),
                ("a 304 whose body comes later", answer("304 Not Modified", "", announced=False), b"{}"),
                ("a 204 with a body", answer("204 No Content", "{}", announced=False), b""),
                ("HTTP/1.0", mine.replace(b"HTTP/1.1", b"HTTP/1.0"), b""),
                ("a 304 that announces one", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", b"")):
            with self.subTest(why):
                upstream.close()  # a connection of its own for each
                self.behind.script["Observation/mine"] = sent
                self.get("Observation/mine")
                with contextlib.suppress(ValueError, OSError):  # the last one is closed already
                    self.behind.writers[-1].write(later)
                    self.behind.writers[-1].flush()
                before = len(self.behind.writers)
                self.assertEqual(self.read("Observation/second")["id"], "second")
                self.assertEqual(len(self.behind.writers), before + 1)

    def test_a_server_at_the_root_may_link_to_a_query_alone(self) -> None:
        root = f"http://127.0.0.1:{self.behind.port}"
        self.script("/Observation", [observation("mine")], next=root + "?_getpages=1")
        with s4s.Server(fhir_server=root) as portal:
            token = portal.issue_token(scope="patient/*.rs", patient_id=ME)["access_token"]
            ask(next_of(ask(portal.fhir_url + "/Observation", token=token).json), token=token)
        self.assertEqual(self.behind.seen[-1][0], "/?_getpages=1")

    def test_a_connection_closed_in_between_is_no_trouble(self) -> None:
        closing = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(json.dumps(observation("mine")))
        self.behind.script["Observation/mine"] = closing + json.dumps(observation("mine")).encode()
        for _ in range(5):
            self.read("Observation/mine")
        self.assertEqual(len(self.behind.seen), 5)

    def test_many_threads_share_them(self) -> None:
        names = [f"o{number}" for number in range(8)]
        self.behind.records = {f"Observation/{name}": observation(name) for name in names}
        wrong: list[str] = []

        def ask() -> None:
            name = names.pop()
            wrong.extend(name for _ in range(20) if self.read(f"Observation/{name}")["id"] != name)
        with together(8, ask):
            pass
        self.assertEqual((wrong, len(self.behind.seen)), ([], 160))
        before = len(self.behind.writers)
        self.read("Observation/o1")
        self.assertEqual(len(self.behind.writers), before, "they are reused")

    def test_what_travels_and_the_apps_credentials_do_not(self) -> None:
        sent = {"Prefer": "handling=strict, return=minimal", "If-None-Match": 'W/"3"',
                "If-Modified-Since": "Thu, 31 May 2018 22:48:43 GMT"}
        more = {"Prefer": "respond-async, handling=strict; x=y, wait=10,return=minimal", "Cookie": "a=b",
                "X-Other": "c", "Accept": "application/json"}
        self.get("Observation/mine", headers={**sent, **more})
        for _, headers, _ in self.behind.seen:
            self.assertEqual({"authorization", "cookie", "x-other"} & headers.keys(), set())
        self.assertNotIn(self.token, str(self.behind.seen))
        headers = {**self.behind.seen[0][1], **self.behind.seen[1][1]}
        self.assertEqual({name: headers.get(name.lower()) for name in sent}, sent)
        self.assertEqual(headers["x-api-key"], "swordfish")
        self.assertIn("application/json+fhir", headers["accept"])
        for url, coding in ((self.behind.url, "identity"), ("https://fhir.example", "gzip")):
            upstream = s4s.Upstream(s4s.Settings(fhir_server=url), s4s.OpenSockets())
            self.assertIn(f"\nAccept-Encoding: {coding}\r", upstream.headers)

    def test_what_comes_back_in_a_header_is_what_belongs_there(self) -> None:
        date, other = "Thu, 31 May 2018 22:48:43 GMT", {"Set-Cookie": "a=b", "Content-Location": "x"}
        self.script("Observation/mine", observation("mine"), 200, {**other, "Server": "secret"})
        headers = self.get("Observation/mine").headers
        self.assertEqual({"set-cookie", "server", "content-location"} & headers.keys(), set())
        for name, status, good in (("ETag", 200, ['W/"4"', '"a.B-9_~=+"']), ("Last-Modified", 200, [date]),
                                   ("Retry-After", 503, ["120", date])):
            for value in (*good, OTHER, f'W/"{self.behind.url}"', f'"{"x" * 65}"', f"{date} {OTHER}", "-1",
                          '"a" "b"', "W/4", "9" * 10, f"<{self.behind.url}>"):
                with self.subTest(name, value=value):
                    self.script("Observation/mine", observation("mine"), status, {name: value})
                    got = self.get("Observation/mine").headers.get(name.lower())
                    self.assertEqual(got, value if value in good else None)
        put: Any = {"method": "PUT", "data": observation("mine"), "token": self.issue("patient/*.crus")}
        for number, tag in (("9", 'W/"9"'), (OTHER * 9, None)):  # the version tells it where no header does
            for target in ("Observation/mine", "PUT Observation/mine"):
                self.script(target, observation("mine", meta={"versionId": number}))
            for how in (dict[str, Any](), put):
                answer = self.get("Observation/mine", **how)
                self.assertEqual((answer.status, answer.headers.get("etag")), (200, tag))

    def test_json_comes_in_the_type_asked_for_and_dstu2_keeps_its_own(self) -> None:
        theirs = {"Content-Type": "application/json+fhir; charset=UTF-8"}
        self.script("Observation/mine", observation("mine"), 200, theirs)
        for asked, given in (("*/*", "application/json+fhir"), ("application/json", "application/json")):
            got = self.get("Observation/mine", headers={"Accept": asked})
            self.assertEqual(got.headers["content-type"], given)
        self.behind.seen.clear()
        self.assert_not_forwarded("Observation/mine", 406, headers={"Accept": "application/fhir+xml"})

    def test_proxies_of_the_environment_are_not_used(self) -> None:
        proxy = "http://127.0.0.1:9"
        with mock.patch.dict(os.environ, {"http_proxy": proxy, "HTTP_PROXY": proxy}):
            self.read("Observation/mine")


class WhatIsBehind(ForwardingTest):
    """Metadata, version and patients of the FHIR server."""
    STATEMENT: ClassVar[dict[str, Any]] = made(
        "CapabilityStatement", fhirVersion="4.0.1", publisher="hidden.example",
        rest=[{"mode": "server", "security": {"description": "hidden.example"}, "resource": [
            {"type": "Observation", "operation": [{"name": "lastn"}],
             "interaction": [{"code": code} for code in ("read", "vread", "create", "search-type")],
             "searchParam": [{"name": "code", "type": "token", "documentation": "hidden.example"},
                             {"name": "_has", "type": "string"}, {"name": "_id", "type": "token"}]},
            {"type": "AuditEvent", "interaction": [{"code": "read"}]},
            {"type": "Patient", "interaction": [{"code": "create"}]}]}])

    def portal_with(self, statement: dict[str, Any]) -> s4s.Portal:
        """A portal of its own, that has not asked yet."""
        self.script("metadata", statement)
        settings = s4s.Settings(fhir_server=self.behind.url, open_fhir=True)
        return cast(s4s.Portal, self.during(contextlib.closing(s4s.Portal(settings))))

    def metadata(self, portal: s4s.Portal, api: str = "fhir") -> tuple[s4s.Response, dict[str, Any], str]:
        answer = s4s.dispatch(portal, s4s.Request("GET", f"/api/{api}/metadata", {"host": "127.0.0.1:1"}))
        return answer, json.loads(answer.body), answer.body.decode()

    def test_metadata_lists_what_the_portal_lets_through(self) -> None:
        portal = self.portal_with(self.STATEMENT)
        _, found, text = self.metadata(portal)
        self.assertNotIn("hidden.example", text)
        self.assertEqual(found["rest"][0]["resource"], [{"type": "Observation",
            "interaction": [{"code": code} for code in ("read", "vread", "search-type", "create")],
            "searchParam": [{"name": "code", "type": "token"}, {"name": "_id", "type": "token"}]}])
        self.assertIn("/oauth/authorize", json.dumps(found["rest"][0]["security"]))
        self.assertNotIn("security", self.metadata(portal, "open-fhir")[1]["rest"][0])
        patient = {"type": "Patient", "interaction": [{"code": "read"}]}
        for more in ({}, {"operation": [{"name": "everything", "definition": "x"}]}):
            portal = self.portal_with({**self.STATEMENT, "rest": [{"resource": [{**patient, **more}]}]})
            self.assertEqual("_since, _type" in self.metadata(portal)[2], bool(more))

    def test_metadata_is_in_the_version_of_the_fhir_server(self) -> None:
        portal = self.portal_with({**self.STATEMENT, "resourceType": "Conformance", "fhirVersion": "1.0.2"})
        answer, found, text = self.metadata(portal)
        self.assertEqual([found[name] for name in ("resourceType", "fhirVersion", "acceptUnknown")],
                         ["Conformance", "1.0.2", "no"])
        self.assertIn('"http://hl7.org/fhir/restful-security-service"', text)
        self.assertIn(("Content-Type", "application/json+fhir"), answer.headers)

    def test_metadata_is_asked_for_every_five_minutes_at_most(self) -> None:
        portal = self.portal_with(self.STATEMENT)
        for seconds, asked in ((0, 1), (299, 1), (2, 2)):
            portal.clock.advance(seconds)
            self.metadata(portal)
            self.assertEqual(len(self.behind.seen), asked)
        self.assertEqual(self.metadata(self.portal_with(made("Patient")))[0].status, 502)

    def test_the_version_is_the_servers_or_r4_with_a_warning_and_who_asks_for_another_gets_406(self) -> None:
        for told, version, known in (
                ("1.0.2", "dstu2", ["1.0"]), ("3.0.1", "stu3", ["3.0"]), ("4.0.1", "r4", ["4.0", "4.3"]),
                ("4.3.0", "r4", ["4.0", "4.3"]), *((wrong, "", ["4.0", "4.3"]) for wrong in (
                    "", "x", ["5.0.0"], None))):
            portal, lines = self.portal_with({**self.STATEMENT, "fhirVersion": told}), list[str]()
            portal.log = lines.append
            for asked in ("1.0", "3.0", "4.0", "4.3"):
                with self.subTest(told=told, asked=asked):
                    headers = {"host": "localhost", "accept": f"application/fhir+json; fhirVersion={asked}"}
                    request = s4s.Request("GET", "/api/open-fhir/Observation/mine", headers)
                    self.assertEqual(s4s.dispatch(portal, request).status, 200 if asked in known else 406)
            self.assertEqual(portal.records.version, version or "r4")
            self.assertEqual(str(lines).count("R4 is assumed"), 0 if version else 1)

    def test_nothing_comes_from_a_version_that_is_not_understood(self) -> None:
        self.behind.records["Appointment/a"] = made(
            "Appointment/a", subject=to(f"Patient/{OTHER}"), participant=[{"actor": to(f"Patient/{ME}")}])
        for version in ("5.0.0", "6.0.0-ballot2", "4.6.0", "0.0.82", "40.1"):
            self.script("metadata", {**self.STATEMENT, "fhirVersion": version})
            self.portal.reset()
            token, log = self.issue(self.scope), log_of(self.portal)
            said = f"FHIR {version[:version.index('.') + 2]}; understood are 1.0, 3.0, 4.0, 4.3"
            for path in ("Appointment/a", "Appointment", f"Patient/{ME}/$everything", "metadata"):
                with self.subTest(version, path=path):
                    got = self.get(path, token=token)
                    self.assertEqual(got.status, 502, got)
                    self.assertIn(said, got.json["issue"][0]["diagnostics"])
            [line] = log
            self.assertIn(said, line)

    def test_metadata_tells_no_more_of_a_lying_server_than_versions_names_and_types(self) -> None:
        lie = json.loads(json.dumps({**self.STATEMENT, "fhirVersion": f"4.0.1 {OTHER} hidden.example"}))
        lie["rest"][0]["resource"].append(7)
        lie["rest"][0]["resource"][0]["searchParam"] += [7, *(
            {"name": "date", "type": wrong} for wrong in (f"hidden.example/{OTHER}", [OTHER]))]
        answer, _, text = self.metadata(self.portal_with(lie))
        self.assertEqual(answer.status, 200)
        self.assertNotRegex(text, f"hidden.example|{OTHER}")

    def test_patients_are_found_by_name(self) -> None:
        names: tuple[Any, ...] = ([{"given": ["Ann", "B"], "family": ["Cee"]}], [{"text": "Dee"}], [])
        self.script("Patient", [*(made(f"Patient/p{number}", name=name) for number, name in enumerate(names)),
                                observation("x"), made("Patient"), made("Patient", id=7)])
        records = self.portal.portal.records
        self.assertEqual(records.find_patients("a&b"), [("p0", "Ann B Cee"), ("p1", "Dee"), ("p2", "p2")])
        self.assertEqual(self.behind.seen[-1][0], "/fhir/Patient?name=a%26b&_count=50")
        self.assertEqual([records.patient_name(name) for name in (ME, "../x")], [ME, None])

    def test_open_access_to_it_is_off_unless_told(self) -> None:
        for told, expected in ((None, False), (False, False), (True, True)):
            settings = s4s.Settings(fhir_server=self.behind.url, open_fhir=told)
            self.assertIs(settings.serves_open_fhir, expected)

    def test_settings_that_cannot_be(self) -> None:
        wrong: dict[str, tuple[Any, ...]] = {
            "fhir_server": ("ftp://x/", "x", "http://u@h/", "http:///x", "http://h/?a", "http://h/#a",
                            "http://h:99999", "http://h/../a", "http://a..b", f"http://{'x' * 64}", 7,
                            *("http://[1:2:3]:5/x" for _ in range(sys.version_info >= (3, 11, 4)))),
            "fhir_header": ("x", "A: b\r\nC: d", ["Host: x"], "Content-Length: 1", "A:"),
            "fhir_timeout": (0, float("nan"), "soon", 1e9)}
        for name, values in wrong.items():
            for value in values:
                with self.subTest(value), self.assertRaises(s4s.StartError):
                    s4s.Settings(**{name: value})


# ######################################################################## 20 sample data

# What each version asks for, S4S's apps do, or, in R4, US Core (3.1.1 to 7.0) and IPA of PROFILED types. Of
# each type: elements that in DSTU2, STU3 and R4 are a dict, list, str, int, bool, or "-": not there. A dotted
# path takes the first of a list.
ELEMENTS = """
AllergyIntolerance ddd:patient d--:substance -dd:code s--:status -sd:clinicalStatus,verificationStatus
    s-s:recordedDate -s-:assertedDate
Binary -dd:securityContext sss:contentType ss-:content --s:data
CarePlan ddd:subject,period sss:status lll:category -ss:intent -ll:careTeam
CareTeam -dd:subject,participant.member -ss:status -ll:participant -dl:participant.role
Condition ddd:code d--:patient -dd:subject s--:dateRecorded sss:onsetDateTime dll:category
    ssd:clinicalStatus,verificationStatus
Coverage -dd:beneficiary,type,period,relationship -ss:status,subscriberId -ll:payor --l:class
Device ddd:type,patient sss:status sd-:udi --l:udiCarrier --s:distinctIdentifier,udiCarrier.deviceIdentifier
DiagnosticReport ddd:code,subject sss:status,effectiveDateTime,issued,result.reference dll:performer
    ddl:category
DocumentReference ddd:masterIdentifier,subject,type
    sss:status,description,content.attachment.contentType,content.attachment.url ss-:indexed,created --s:date
    --l:category ddl:context.encounter lll:identifier ldd:content.format
Encounter d--:patient -dd:subject sss:status,period.start lll:type sdd:class
Endpoint -ss:address
ExplanationOfBenefit -dd:patient,type,insurer,provider -s-:item.net.system --s:use -ss:status,created
    --l:total -ds:outcome -dl:insurance -d-:item.service,totalCost,totalBenefit --d:item.productOrService
Goal ddd:subject sdd:description ss-:status --s:lifecycleStatus s--:targetDate -ss:target.dueDate -dl:target
ImagingStudy ddd:series.modality sss:started,series.uid ss-:uid,availability --s:status -ll:endpoint
    --l:identifier,modality -d-:context --d:subject,encounter dd-:patient iii:numberOfSeries,numberOfInstances
    ll-:modalityList
Immunization ddd:vaccineCode,patient sss:status ss-:date --s:occurrenceDateTime b--:wasNotGiven,reported
    -b-:notGiven -bb:primarySource
Location ddd:address,managingOrganization ddl:type sss:status,name
MedicationAdministration ddd:medicationCodeableConcept d--:patient,dosage.quantity -dd:subject,dosage.dose
    s--:effectiveTimeDateTime sss:status -ss:effectiveDateTime --d:request dd-:prescription
MedicationDispense ddd:medicationCodeableConcept d--:patient -dd:subject sss:status,whenHandedOver
    lll:authorizingPrescription
MedicationOrder d--:patient,prescriber,medicationCodeableConcept,dosageInstruction.doseQuantity
    s--:status,dateWritten,dosageInstruction.timing.repeat.periodUnits ---:intent
MedicationRequest -dd:subject,medicationCodeableConcept,requester --s:requester.reference
    -ss:status,intent,authoredOn,dosageInstruction.timing.repeat.periodUnit --l:dosageInstruction.doseAndRate
    -d-:requester.agent,dosageInstruction.doseQuantity
MedicationStatement ddd:effectivePeriod,medicationCodeableConcept d--:patient -dd:subject -s-:taken sss:status
    -ll:basedOn
Observation ddd:code,subject sss:status,effectiveDateTime,category.coding.code dll:category
Organization sss:name dll:type bbb:active
Patient ddd:communication.language sss:identifier.system,identifier.value,gender,birthDate
    lll:name.given,address,telecom lss:name.family
Practitioner dll:name sss:identifier.system,identifier.value lss:name.family
PractitionerRole -dd:practitioner,organization -ll:code,specialty,location -ss:telecom.value
Procedure ddd:subject,code sss:status,performedDateTime -d-:context d-d:encounter
Provenance lll:target,agent sss:recorded,target.reference --s:agent.who.reference dl-:agent.role
    --d:agent.type,agent.who -d-:agent.whoReference d--:agent.actor
Questionnaire sss:status d--:group -ss:url,title -ll:item
QuestionnaireResponse ddd:subject sss:status,authored dds:questionnaire d--:group -ll:item -ss:item.linkId
RelatedPerson ddd:patient dll:name ddl:relationship -bb:active"""
TYPES = {kind.__name__[0]: kind for kind in (dict, list, str, int, bool)}
PROFILED = """AllergyIntolerance CarePlan CareTeam Condition Coverage Device DiagnosticReport Encounter
    DocumentReference Goal Immunization Location MedicationDispense MedicationRequest MedicationStatement
    Observation Organization Patient Practitioner PractitionerRole Procedure Provenance QuestionnaireResponse
    RelatedPerson"""


def at(value: Any, path: str) -> Any:
    """What is at a dotted path, of lists in the first; None if nothing."""
    *outer, last = path.split(".")
    for name in outer:
        value = value.get(name, {})
        value = value[0] if isinstance(value, list) else value
    return value.get(last)


def walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def luhn(digits: str) -> int:
    """The sum that LOINC's check digit brings to a multiple of ten."""
    return sum(sum(divmod(int(digit) * (1 + place % 2), 10)) for place, digit in enumerate(reversed(digits)))


def verhoeff(digits: str) -> int:
    """The sum that SNOMED CT's check digit brings to 0: steps in the group of a pentagon's turns, flips."""
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

    def of_type(self, version: str, type_name: str) -> list[dict[str, Any]]:
        return [resource for resource in self.records[version] if resource["resourceType"] == type_name]

    def test_elements_are_those_of_the_version(self) -> None:
        type_name = ""
        for word in ELEMENTS.split():
            letters, _, paths = word.partition(":")
            if not paths:
                type_name = word
                continue
            for path, (version, letter) in itertools.product(paths.split(","), zip(self.records, letters)):
                kind = TYPES.get(letter, type(None))
                values = [at(resource, path) for resource in self.of_type(version, type_name)]
                with self.subTest(version=version, element=f"{type_name}.{path}"):
                    self.assertTrue(values or letter == "-")
                    self.assertLessEqual({type(value) for value in values}, {kind})

    def test_codes_are_those_of_the_version(self) -> None:
        for type_name, path, *expected in (
                ("AllergyIntolerance", "category", {"medication"}, {"['medication']"}, {"['medication']"}),
                ("AllergyIntolerance", "criticality", {"CRITL"}, {"low"}, {"low"}),
                ("CarePlan", "category.coding.code", {"assess-plan", "careteam"}, {"assess-plan"},
                 {"assess-plan"}), ("CarePlan", "category.coding.system", {"http://argonaut.hl7.org"}, None,
                                    {"http://hl7.org/fhir/us/core/CodeSystem/careplan-category"}),
                ("Condition", "category.coding.code", {"problem", "health-concern"},
                 {"problem-list-item", "health-concern"}, {"problem-list-item", "health-concern"}),
                ("DiagnosticReport", "category.coding", {str([
                    {"system": "http://hl7.org/fhir/v2/0074", "code": "LAB", "display": "Laboratory"},
                    {"system": "http://hl7.org/fhir/ValueSet/diagnostic-service-sections", "code": "LAB"}])},
                 None, None),
                ("Organization", "type.coding.code", {"prov", "ins"}, {"prov", "ins"}, {"prov", "pay"}),
                ("Questionnaire", "status", {"published"}, {"active"}, {"active"}),
                ("Provenance", "agent.role.code", {"author", "informant"}, set(), set()),
                ("Encounter", "class", {"ambulatory"}, None, None),
                ("Encounter", "class.code", None, {"AMB"}, {"AMB"}),
                ("ImagingStudy", "availability", {"ONLINE"}, {"ONLINE"}, set()),
                ("Immunization", "status", {"completed"}, {"completed"}, {"completed", "not-done"}),
                ("Immunization", "wasNotGiven", {"True", "False"}, set(), set()),
                ("Immunization", "notGiven", set(), {"True", "False"}, set()),
                ("CarePlan", "text.status", None, {"generated"}, {"generated"}),
                ("CarePlan", "text.div", None, *2 * ({
                    '<div xmlns="http://www.w3.org/1999/xhtml">Less salt, and a walk each day.</div>'},)),
                ("ImagingStudy", "series.uid", {"urn:oid:2.25"}, {"urn:oid:2.25"}, {"2.25"}),
                ("Immunization", "explanation.reasonNotGiven.coding.code", {"PATOBJ"}, {"PATOBJ"}, set()),
                ("Immunization", "statusReason.coding.code", set(), set(), {"PATOBJ"}),
                ("MedicationStatement", "taken", set(), {"y"}, set())):
            for version, codes in zip(("dstu2", "stu3", "r4"), expected):
                if codes is not None:
                    values = {re.sub(r"(2\.25)\..*", r"\1", str(at(resource, path)))
                              for resource in self.of_type(version, type_name)}
                    self.assertEqual(values - {"None"}, codes, (version, type_name, path))

    def test_the_records_meet_the_profiles_that_the_metadata_of_r4_names(self) -> None:
        for version in self.records:
            with s4s.Server(fhir_version=version) as portal:
                statement = ask(f"{portal.fhir_url}/metadata").json
            profiled = {kind["type"]: kind["supportedProfile"] for kind in statement["rest"][0]["resource"]
                        if "supportedProfile" in kind}
            guides = {"http://hl7.org/fhir/us/core/": "us-core", "http://hl7.org/fhir/uv/ipa/": "ipa"}
            self.assertEqual(statement.get("instantiates"), [
                f"{base}CapabilityStatement/{name}-server" for base, name in guides.items()]
                if version == "r4" else None)
            self.assertEqual(set(profiled), set(PROFILED.split()) if version == "r4" else set())
        for base, name in guides.items():
            self.assertIn(f"{base}StructureDefinition/{name}-patient", profiled["Patient"])
        imports = [agent for resource in self.of_type("r4", "Provenance") for agent in resource["agent"]]
        self.assertTrue(all("onBehalfOf" in agent or "Practitioner/" not in agent["who"]["reference"]
                            for agent in imports))

    def test_an_observation_has_a_value_or_components(self) -> None:
        for version in self.records:
            for resource in self.of_type(version, "Observation"):
                values = {"valueQuantity", "valueCodeableConcept", "component"}.intersection(resource)
                self.assertEqual(len(values), 1, (version, resource["id"]))

    def test_every_id_is_there_once_and_every_reference_leads_to_one(self) -> None:
        for version, records in self.records.items():
            places = [f"{resource['resourceType']}/{resource['id']}" for resource in records]
            references = {value["reference"] for value in walk(records) if "reference" in value}
            documents = {value["url"] for value in walk(records) if "contentType" in value and "url" in value}
            users = {"Practitioner/smart-clinician", "RelatedPerson/daniel-adams-amy-shaw"}
            with self.subTest(version=version):
                self.assertEqual(len(places), len(set(places)))
                for place in places:
                    self.assertRegex(place, r"\A[A-Za-z]+/[A-Za-z0-9.-]{1,64}\Z")
                self.assertGreater(len(references), 70)
                self.assertEqual(len(documents), 2)
                self.assertLessEqual(references | documents | users, set(places))

    def test_dates_are_of_the_calendar_and_times_have_a_zone(self) -> None:
        for records in self.records.values():
            dates = [value for each in walk(records) for value in each.values()
                     if isinstance(value, str) and re.match(r"\d{4}-\d\d", value)]
            self.assertGreater(len(dates), 500)
            for date in dates:
                datetime.datetime.strptime(date, "%Y-%m-%dT%H:%M:%SZ" if "T" in date else "%Y-%m-%d")

    def test_changes_are_spread_over_time_alike_in_each_version(self) -> None:
        changed = {version: {resource["id"]: resource["meta"] for resource in records}
                   for version, records in self.records.items()}
        times = sorted(meta["lastUpdated"] for meta in changed["r4"].values())
        self.assertLess(times[0], "2016-02")
        self.assertGreater(times[-1], "2018-03")
        self.assertEqual({meta["versionId"] for meta in changed["r4"].values()}, {"1"})
        for resource_id, meta in changed["r4"].items():
            self.assertEqual(changed["stu3"][resource_id], meta)
            self.assertEqual(changed["dstu2"].get(resource_id, meta), meta)

    def test_codes_have_their_system_and_a_right_check_digit(self) -> None:
        self.assertEqual([luhn(code) % 10 == 0 for code in ("23457", "23475")], [True, False])
        self.assertEqual([verhoeff(code) == 0 for code in ("22298006", "22298060")], [True, False])
        codes = {(value.get("system"), value["code"]) for records in self.records.values()
                 for value in walk(records) if isinstance(value.get("code"), str)}
        of_system = {system: [code for each, code in codes if each == system] for system, _ in codes}
        self.assertNotIn(None, of_system)
        loinc, snomed = of_system["http://loinc.org"], of_system["http://snomed.info/sct"]
        self.assertGreater(len(loinc), 35)
        self.assertEqual([code for code in loinc if luhn(code.replace("-", "")) % 10], [])
        self.assertGreater(len(snomed), 20)
        self.assertEqual([code for code in snomed if verhoeff(code) or code[-3:-1] not in ("00", "10")], [])

    def test_units_are_of_ucum(self) -> None:
        units = {value.get("code", "") for records in self.records.values() for value in walk(records)
                 if isinstance(value.get("value"), (int, float)) and "currency" not in value
                 and value.get("system") != "urn:iso:std:iso:4217"}
        self.assertEqual(" ".join(sorted(units)),
                         "% /[HPF] /[LPF] /min 1 10*3/uL 10*6/uL Cel U/L [pH] cm d g/dL kg kg/m2 mL mg/L "
                         "mg/dL mm[Hg] mmol/L u[IU]/mL {tablet}")

    def test_each_version_has_its_own_code_systems(self) -> None:
        dstu2, stu3, r4 = map(json.dumps, self.records.values())
        self.assertIn('"http://terminology.hl7.org/CodeSystem/observation-category"', r4)
        self.assertIn('"http://hl7.org/fhir/v3/Ethnicity"', dstu2)
        for text in (dstu2, stu3):
            self.assertIn('"http://hl7.org/fhir/observation-category"', text)
            self.assertIn('"http://hl7.org/fhir/v2/0203"', text)
            self.assertNotIn("terminology.hl7.org", text)

    def test_vital_signs_have_the_codes_and_units_of_the_profiles(self) -> None:
        expected = {"8867-4": "/min", "9279-1": "/min", "8310-5": "Cel", "8302-2": "cm",
            "29463-7 3141-9": "kg", "59408-5 2708-6": "%", "39156-5": "kg/m2", "8480-6": "mm[Hg]",
            "8462-4": "mm[Hg]", "13457-7 2089-1": "mg/dL", "4548-4": "%"}
        for version, records in self.records.items():
            units = {" ".join(coding["code"] for coding in value["code"]["coding"]):
                     at(value, "valueQuantity.code") for value in walk(records) if "valueQuantity" in value}
            self.assertEqual({code: units.get(code) for code in expected}, expected, version)

    def test_a_child_grows(self) -> None:
        for version in self.records:
            signs: dict[str, list[tuple[str, float]]] = collections.defaultdict(list)
            for resource in self.of_type(version, "Observation"):
                if at(resource, "subject.reference") == f"Patient/{AMY}":
                    signs[at(resource, "code.coding.code")].append(
                        (resource["effectiveDateTime"], at(resource, "valueQuantity.value")))
            height, weight, index = (signs[code] for code in ("8302-2", "29463-7", "39156-5"))
            self.assertEqual((len(height), height[0][0][:7], height[-1][0][:7]), (8, "2008-03", "2016-03"))
            self.assertEqual(sorted(height, key=lambda sign: sign[1]), sorted(height))
            for (_, tall), (_, heavy), (_, bmi) in zip(height, weight, index):
                self.assertAlmostEqual(heavy / (tall / 100) ** 2, bmi, delta=0.06)
            self.assertEqual(len(signs["85354-9"]), 8)

    def test_common_laboratory_values_can_be_drawn_over_time_with_their_normal_range(self) -> None:
        for loinc in ("2345-7", "2160-0", "13457-7", "2823-3", "718-7", "11580-8"):
            results = [resource for resource in self.of_type("r4", "Observation")
                       if at(resource, "code.coding.code") == loinc]
            self.assertEqual(len({result["effectiveDateTime"] for result in results}), 6, loinc)
            self.assertTrue(all("low" in result["referenceRange"][0] for result in results), loinc)

    def test_laboratory_results_are_of_every_kind_and_more_than_a_page(self) -> None:
        paths = ("valueQuantity.value", "referenceRange.low.value", "referenceRange.high.value")
        for version in self.records:
            results = [resource for resource in self.of_type(version, "Observation")
                       if at(resource, "category.coding.code") == "laboratory"]
            ranges = [[at(each, path) for path in paths] for each in results if "referenceRange" in each]
            self.assertGreater(len(results), 20, version)
            self.assertNotIn("SerPl", str([result["code"]["text"] for result in results]))  # words for people
            self.assertEqual({("valueQuantity" in result, "referenceRange" in result) for result in results},
                             {(False, False), (True, False), (True, True)}, version)
            self.assertEqual({(value < low, value > high) for value, low, high in ranges},
                             {(True, False), (False, True), (False, False)}, version)

    def test_documents_can_be_opened(self) -> None:
        for version, records in self.records.items():
            element = "data" if version == "r4" else "content"
            binaries = {binary["contentType"]: base64.b64decode(binary[element])
                        for binary in self.of_type(version, "Binary")}
            sizes = {value["contentType"]: value["size"] for value in walk(records) if "size" in value}
            self.assertEqual({kind: len(data) for kind, data in binaries.items()}, sizes, version)
            self.assertIn(b"Continue present medicines.", binaries["text/plain"])
            self.assertTrue(binaries["application/pdf"].startswith(b"%PDF-1.4\n"))

    def test_the_pdf_says_where_each_of_its_objects_begins(self) -> None:
        data = s4s.pdf("One (1)\nTwo \\ 2")
        self.assertIn(b"(One \\(1\\)) '\n(Two \\\\ 2) '\n", data)
        table = int(data.split(b"startxref\n")[1].split()[0])
        places = data[table:].splitlines()[3:-5]
        self.assertEqual(data[table:table + 5], b"xref\n")
        self.assertEqual([data[int(place[:10]):].split()[0] for place in places],
                         [b"1", b"2", b"3", b"4", b"5", b"6"])


# ######################################################################## 22 signing

class Signatures(unittest.TestCase):
    """JSON Web Signatures, their keys, and the arithmetic below."""
    def test_the_examples_of_the_rfcs(self) -> None:
        signature = b64(s4s.rsa_sign(RFC_7515_KEY, "RS256", RFC_7515_INPUT))
        self.assertEqual(signature, RFC_7515_SIGNATURE, "RFC 7515 appendix A.2")
        good = s4s.verify(RFC_6979_JWK, "ES384", b"sample", RFC_6979_SIGNATURE)
        self.assertTrue(good, "RFC 6979 appendix A.2.6")

    def test_a_signature_is_good_for_its_message_key_and_algorithm_only(self) -> None:
        rs384, rs256 = (s4s.rsa_sign(RFC_7515_KEY, name, b"m") for name in ("RS384", "RS256"))
        again = int.from_bytes(rs384, "big") + RFC_7515_KEY.p * RFC_7515_KEY.q  # the same, modulo the modulus
        for algorithm, jwk, good in (("RS384", RSA_JWK, rs384), ("ES384", RFC_6979_JWK, es384_sign(b"m"))):
            self.assertTrue(s4s.verify(jwk, algorithm, b"m", good))
            self.assertFalse(s4s.verify(jwk, algorithm, b"n", good))
            bent = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1:] for at in (0, 50, len(good) - 1)]
            for wrong in (*bent, b"", good[:-1], good + b"\0", b"\0" * len(good), b"\xff" * len(good), rs256,
                          again.to_bytes(256, "big")):
                with self.subTest(algorithm, wrong=wrong):
                    self.assertFalse(s4s.verify(jwk, algorithm, b"m", wrong))

    def test_a_key_that_is_weak_or_none_is_refused_in_words(self) -> None:
        rsa: list[dict[str, Any]] = [
            {"n": b64(b"\xff" * 128)}, {"e": "AQ"}, {"n": 7}, {"n": None}, {"n": "a b"}, {"n": ["x"]}]
        curve: list[dict[str, Any]] = [
            {"x": b64(b"\1")}, {"crv": "P-256"}, {"crv": ["P-384"]}, {"y": b64(b"\xff" * 48)}, {"x": {}}]
        for algorithm, jwk in (*(("RS384", {**RSA_JWK, **wrong}) for wrong in rsa), ("RS384", {"kty": "RSA"}),
                *(("ES384", {**RFC_6979_JWK, **wrong}) for wrong in curve), ("ES384", RSA_JWK)):
            with self.subTest(jwk=jwk), self.assertRaises(ValueError):
                s4s.verify(jwk, algorithm, b"m", b"")

    def test_a_new_key_has_two_primes_and_all_its_bits(self) -> None:
        key = s4s.new_rsa_key(256)
        self.assertEqual((key.p * key.q).bit_length(), 256)
        for prime in key:  # Euler's test, which is stricter than the code's
            for base in (2, 3, 5, 7, 11, 13):
                self.assertIn(pow(base, prime >> 1, prime), (1, prime - 1))

    def test_what_is_no_base64url_or_no_jwt_is_refused_in_words(self) -> None:
        self.assertEqual(s4s.base64url_bytes("_-8"), b"\xff\xef")
        part = b64(b"{}")
        for read, texts in ((s4s.base64url_bytes, ("_-9", "_-8=", "/+8", "a", "ab c", "Zm9v\n", "\u00e9")),
                (s4s.read_jwt, ("", "a.b", f"{part}.{part}", f"{part}.{part}.{part}.{part}", f"{part}.x.",
                                f"{b64(b'[' * 5000)}.{part}.", f"{b64(b'[]')}.{part}.", *(
                    f"{part}.{b64(text)}." for text in (b"[]", b"7", b"null", b'{"iss": "\\ud800"}'))))):
            for text in texts:
                with self.subTest(text=text[:40]), self.assertRaises(ValueError):
                    read(text)


# ######################################################################## 23 pages

class Pages(PortalTest):
    """What is true of every page a person sees, whatever stands in it: nasty are an app's, patients' and a
    user's names, an address, what was filled in."""
    NASTY = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>"
    pages: ClassVar[list[tuple[str, Answer, Page]]]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.pages = [(name, answer, Page(answer.text)) for name, answer in cls.every_page()]

    @classmethod
    def every_page(cls) -> Iterator[tuple[str, Answer]]:
        """Each page of the portal, by name: before and after signing in, errors too."""
        patients = [{"patient_id": DANIEL, "name": cls.NASTY}, {"patient_id": AMY, "name": cls.NASTY}]
        users = [{"username": "maria", "password": "x", "name": cls.NASTY, "patients": patients}]
        with s4s.Server(name=cls.NASTY, fixtures={"users": users}) as portal:
            scope = "openid fhirUser launch/patient launch/encounter patient/*.rs user/Goal.s?_id=<b>"
            app = App(portal, scope, client_name=cls.NASTY, launch_uris=["https://app.example/l"])
            browser = Browser(portal)
            wrong = [app.authorize_url(**{name: cls.NASTY})[len(portal.url):]
                     for name in ("client_id", "redirect_uri")]
            for path in ("/", "/login", "/launch", "/demo", "/apps", "/nothing", "/revoke/x",
                         "/oauth/consent", "/oauth/authorize", "/" + quote(cls.NASTY), *wrong,
                         "/login?" + urlencode({"username": cls.NASTY, "next": cls.NASTY}),
                         "/oauth/consent?" + urlencode({"request": cls.NASTY}), "/launch?" + urlencode(
                             dict.fromkeys(("launch_uri", "intent", "patient_id"), cls.NASTY))):
                yield path[:40], browser.open(portal.url + path)
            yield "sign-in with a hint", browser.open(app.authorize_url(
                state=cls.NASTY, login_hint=cls.NASTY, nonce=cls.NASTY))
            yield "wrong password", browser.sign_in(cls.NASTY, cls.NASTY)
            yield "picker", browser.sign_in("maria", "x")
            yield "consent", browser.submit(DANIEL)
            yield "a date that is none", browser.submit("authorize", approval_expires=cls.NASTY)
            browser.submit("authorize", approval_expires=s4s.day_of(time.time(), 1))
            yield "apps", browser.open(portal.url + "/apps")
            yield "stop", browser.submit("Stop sharing")
            yield "home", browser.open(portal.url + "/")
            browser.cookies.clear()
            browser.open(app.authorize_url())
            yield "clinician's picker", browser.sign_in("clinician")

    def test_each_page_can_be_read_by_everybody_and_says_that_it_is_for_tests(self) -> None:
        for name, answer, page in self.pages:
            with self.subTest(page=name):
                self.assertTrue(answer.text.startswith("<!doctype html>"))
                self.assertEqual(page.all("html"), [{"lang": "en"}])
                self.assertTrue(page.texts["title"][0].strip())
                wide = "width=device-width, initial-scale=1"
                self.assertTrue(page.all("meta", name="viewport", content=wide))
                for landmark in ("h1", "header", "nav", "main", "footer"):
                    self.assertEqual(len(page.all(landmark)), 1, landmark)
                for field in page.all("input") + page.all("select") + page.all("textarea"):
                    self.assertTrue(field.get("type") == "hidden" or field in page.labelled, field)
                for text, button in zip(page.texts.get("button", []), page.all("button")):
                    self.assertTrue(text.strip() or "hidden" in button)
                ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
                self.assertEqual(len(ids), len(set(ids)))
                self.assertIn("test server with made-up patients", page.texts["footer"][0])

    def test_no_page_loads_anything_or_opens_a_dialog_whatever_a_name_holds(self) -> None:
        for name, answer, page in self.pages:
            with self.subTest(page=name):
                for tag, attributes in page.elements:
                    self.assertNotIn(tag, ("link", "img", "iframe", "object", "embed", "base", "b"))
                    self.assertFalse({"src", "style"} & attributes.keys(), attributes)
                    self.assertFalse([name for name in attributes if name.startswith("on")], attributes)
                self.assertNotRegex("".join(page.texts["style"]), r"url\(|@import")
                for script in page.texts.get("script", []):
                    self.assertNotRegex(script, r"\b(alert|confirm|prompt)\(|innerHTML\b[^ ]")
                self.assertIn("&lt;script&gt;", answer.text)
                self.assertNotRegex(answer.text, "<script>alert|<img|javascript:")

    def test_each_page_runs_its_own_script_and_style_and_no_other(self) -> None:
        for name, answer, page in self.pages:
            with self.subTest(page=name):
                directives = answer.headers["content-security-policy"].split(";")
                policy = dict(directive.strip().partition(" ")[::2] for directive in directives)
                for element in ("style", "script"):
                    digests = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
                               for text in page.texts.get(element, [])]
                    self.assertEqual(policy.get(f"{element}-src", ""), " ".join(digests))
                for directive in ("default-src", "base-uri", "frame-ancestors"):
                    self.assertEqual(policy[directive], "'none'")
                self.assertNotIn("form-action", policy)
                for header, value in (("referrer-policy", "no-referrer"), ("cache-control", "no-store"),
                                      ("x-content-type-options", "nosniff")):
                    self.assertEqual(answer.headers[header], value)


class ConsentPage(PortalTest):
    """What the person who decides is told, and what scripts click."""
    def consent(self, scope: str = "launch/patient patient/*.rs offline_access", **metadata: Any) -> Page:
        self.app = App(self.portal, scope, **metadata)
        self.browser = signed_in(self.portal, self.app.authorize_url())
        return Page(self.browser.submit(DANIEL).text)

    def test_it_shows_the_apps_id_and_who_registered_it(self) -> None:
        page = self.consent(client_name="The hospital itself")
        self.assertIn(self.app.client_id, page.texts["code"])
        self.assertRegex(page.main, "(?s)(?=.*registered itself)(?=.*https://app.example)"
                         ".*Approve only if you have just come from that app")
        place = "http://tests.dev.syncfor.science:9003"
        main = self.consent(known=("test-suite", ""), redirect_uris=[place + "/authorized/"]).main
        self.assertIn(place, main)
        self.assertNotRegex(main, "registered itself|False")

    def test_the_values_of_a_scope_stand_in_quotes(self) -> None:
        values = "code=it%20is%20yours,http://x%7C1&status=final"
        page = self.consent(f"launch/patient patient/Observation.rs?{values}")
        self.assertIn('but only where code is "it is yours" or "http://x|1" and status is "final"', page.main)
        self.assertLessEqual({'"it is yours"', '"http://x|1"', '"final"'}, set(page.texts["code"]))

    def test_it_says_in_words_who_asks_for_what_of_whom_and_where_it_goes(self) -> None:
        main = self.consent(client_name="My app").main
        for words in ("My app", "the health record of Daniel Adams", "https://app.example",
                      "Until the end of", "You can stop sharing before that day"):
            self.assertIn(words, main)
        self.assertIn({"href": "/apps"}, Page(self.browser.page.text).all("a"))
        everything = "everything, of every kind there is now and may be later, in the record"
        for scope, words in (
                ("patient/*.rs", f"open and search {everything}"), ("patient/*.c", f"add {everything}"),
                ("patient/Condition.r", "open Condition records in the record: problems and diagnoses"),
                ("user/Condition.s", "search Condition records in every record you may open"),
                ("patient/Goal.crus", "open and search and add and change Goal records in the record"),
                ("patient/Goal.write", "add and change Goal records in the record"),
                ("offline_access", "come back for new data when you are not there, until a day you choose")):
            self.assertIn(words, self.consent("launch/patient " + scope).main, scope)

    def test_it_warns_of_everything_and_of_coming_back_and_says_it_once(self) -> None:
        for scope, warnings in (("patient/*.rs offline_access", 2), ("user/Observation.rs", 1),
                                ("patient/Observation.u", 1), ("patient/Observation.rs", 0)):
            page = self.consent("launch/patient " + scope, client_name="My app")
            self.assertEqual(len(page.all("li", **{"class": "note"})), warnings, scope)
        step = self.consent(client_name="My app").texts["section"][0]
        for words in ("My app", "Daniel Adams", "everything, of every kind", "come back for new data"):
            self.assertEqual(step.count(words), 1, words)

    def test_it_and_the_list_of_apps_say_what_an_app_may_add_and_change(self) -> None:
        for scope, words in (("patient/*.rs", ""), ("patient/*.*", "add and change"), ("patient/*.c", "add"),
                             ("patient/Goal.rs patient/Observation.u", "change")):
            with self.subTest(scope):
                self.portal.reset()
                main = self.consent("launch/patient " + scope).main
                self.assertEqual("It can change nothing" in main, not words)
                self.assertEqual("It can delete nothing" in main, bool(words))
                self.assertEqual("What it writes stays there" in main, bool(words))
                for sentence in (f"to see the health record of Daniel Adams, and to {words} records there.",
                                 f"and may {words} records of these kinds"):
                    self.assertEqual(sentence in main, bool(words) and scope != "patient/*.c", sentence)
                self.assertEqual("asks to add records in the health record of Daniel Adams" in main
                                 and "may add there, of" in main, scope == "patient/*.c")
                App(self.portal, "launch/patient " + scope).tokens()
                page = self.browser.open(self.portal.url + "/apps").text
                self.assertEqual(f"It may {words} records of these kinds." in page, bool(words))

    def test_each_category_comes_with_a_sentence(self) -> None:
        self.assertEqual(list(s4s.CATEGORY_WORDS), list(s4s.CATEGORIES))
        main = self.consent().main
        for label, (name, _) in s4s.CATEGORIES.items():
            self.assertIn(name + s4s.CATEGORY_WORDS[label], main)

    def test_it_and_the_apps_page_say_what_of_a_category_this_scope_reaches(self) -> None:
        seen, whole = "patient/Observation.rs", "Whatever else the record holds"
        tests, other = (f"{name} (only observation records"
                        for name in ("Laboratory results", "Everything else"))
        for scope, said, not_said in (("patient/*.rs", "", "(only"), (seen, f"{tests})", "reports on them"),
                (seen, f"{other} of other kinds)", whole),
                (f"{seen} patient/DiagnosticReport.rs patient/Goal.rs",
                 "records of other kinds, diagnostic report records of other kinds, goal records)", tests),
                ("patient/MedicationRequest.rs patient/Patient.rs",
                 "Medications (only medication request records)", "patient records"),
                (f"{seen}?code=8867-4", f'{other} of other kinds where code is "8867-4")', whole),
                (f"{seen}?code=8867-4 {seen}", f"{other} of other kinds)", "where code"),
                (f"{seen}?category=laboratory", f"{tests})", "Vital signs"),
                ("patient/*.r?status=final", 'Visits (only records where status is "final")', "Visits;")):
            with self.subTest(scope, said=said):
                step_3 = self.consent("launch/patient " + scope).main.partition("Review")[2]
                self.assertIn("code", self.browser.submit("authorize").location)
                for told in (step_3, Page(self.browser.open(self.portal.url + "/apps").text).texts["tr"][1]):
                    self.assertIn(said, told)
                    self.assertNotIn(not_said, told)

    def test_old_automation_finds_its_ids_and_attributes(self) -> None:
        page, steps = self.consent(), self.browser.page.text.partition("</main>")[0].split("<section")[1:]
        [until], [form] = page.all("input", name="approval_expires"), page.all("form", id="consent-carousel")
        self.assertEqual([tuple(step.count(words) for words in (
            "glyphbox", 'data-slide="next">Continue<', "btn-default", "security_labels", 'id="authorize"'))
            for step in steps], [(0, 1, 1, 0, 0), (3, 1, 0, 0, 0), (0, 0, 1, len(s4s.CATEGORIES), 1)])
        for box in page.all("input", rel="confirm"):
            wanted = {"type": "checkbox", "class": "glyphbox", "rel": "confirm", "required": ""}
            self.assertEqual(box, wanted)  # and nothing is sent of it
        self.assertTrue(page.all("input", name="security_labels", value="vital-signs"))
        self.assertTrue(until["type"] == "date" and until["min"] < until["value"] < until["max"])
        for refusal in page.all("button", **{"class": "btn-default"}):  # one may refuse at once
            self.assertEqual((refusal["value"], refusal["formnovalidate"]), ("deny", ""))
        self.assertEqual(form["method"], "post")
        sign_in = Page(Browser(self.portal).open(self.portal.url + "/login").text)
        for name, value in (("username", "daniel-adams"), ("password", "demo-password")):
            self.assertTrue(sign_in.all("input", id=name, name=name, value=value))
        self.assertTrue(sign_in.all("button", id="sign-in"))

    def test_with_a_mistake_it_comes_back_as_it_was_filled_in(self) -> None:
        soon = s4s.day_of(time.time() + 9 * s4s.DAY)
        past = "2020-01-01 is not from today to two years from now."
        for without, day, words in (("security_labels", soon, "Check at least one, or do not approve."),
                                    ("", "2020-01-01", past)):
            with self.subTest(words):
                self.consent()
                got = self.browser.submit("authorize", without=without, approval_expires=day)
                page = Page(got.text)
                self.assertEqual((got.status, len(page.all("input", rel="confirm", checked=""))), (400, 3))
                self.assertIn(words, page.texts["span"])
                self.assertEqual(page.all("input", type="date")[0]["value"], day)
                checked = page.all("input", name="security_labels", checked="")
                self.assertEqual(len(checked), 0 if without else len(s4s.CATEGORIES))
                again = self.browser.submit("authorize", security_labels="problems", approval_expires=soon)
                self.assertIn("code", again.location)

    def test_no_page_between_is_the_answer_to_a_form_that_the_browser_would_send_again(self) -> None:
        self.consent()
        self.assertEqual(query_of(self.browser.url)["patient_id"], DANIEL)
        self.assertEqual(self.browser.open(self.browser.url).text.count('id="authorize"'), 1)

    @unittest.skipUnless(shutil.which("node"), "needs node")
    def test_each_step_is_an_entry_of_the_browsers_history(self) -> None:
        shown, entries = json.loads(output_of("node", "-", given="""
            let confirmed = false, on = {}, shown = [], entries = [];
            const missing = {reportValidity() { shown.push('confirm!'); }};
            const steps = [0, 1, 2].map(number => ({
              classList: {toggle: (_, is) => is && shown.push(number + 1)},
              querySelector: what => what === 'h2' ? {focus() {}} : number === 1 && !confirmed && missing}));
            const page = {classList: {add() {}}, querySelectorAll: () => steps, querySelector: () => null,
              addEventListener: (_, does) => { on.click = does; }};
            globalThis.document = {getElementById: () => page};
            globalThis.window = {addEventListener: (_, does) => { on.popstate = does; }};
            globalThis.history = {pushState: at => entries.push(at), back: () => shown.push('back')};
            const press = slide => on.click({target: {closest: () => ({dataset: {slide}})}});
            {""" + s4s.CONSENT_SCRIPT + """}
            press('next'); press('next'); confirmed = true; press('next');
            on.popstate({state: 1}); on.popstate({state: null}); on.popstate({state: 2});
            confirmed = false; on.popstate({state: 2}); press('back');
            console.log(JSON.stringify([shown, entries]));"""))
        self.assertEqual((shown, entries), ([1, 2, "confirm!", 3, 2, 1, 3, 2, "back"], [1, 2]))

    def test_enter_in_a_field_decides_nothing(self) -> None:
        first = self.consent().all("button")[1]  # a form's first button is what Enter presses
        self.assertTrue("hidden" in first and "name" not in first, first)
        self.assertIn("Confirm each point", self.browser.submit("Stay").text)


class SignInPage(PortalTest):
    """GET /login, and the way out again."""
    def test_it_says_which_app_is_asking_while_it_asks(self) -> None:
        browser, asks = Browser(self.portal), "Asker asks to see a health record"
        page = browser.open(App(self.portal, client_name="Asker").authorize_url())
        self.assertIn(asks, Page(page.text).main)
        self.assertIn(asks, Page(browser.sign_in(password="wrong").text).main)
        self.portal.advance(s4s.PENDING_SECONDS + 1)
        for url in (browser.url, self.portal.url + "/login"):
            self.assertNotIn("asks to see", browser.open(url).text)

    def test_the_wrong_person_signs_out_and_the_right_one_goes_on_with_the_same_app(self) -> None:
        for button in ("", DANIEL):  # from the picker, and from the consent
            browser = signed_in(self.portal, App(self.portal, client_name="Asker").authorize_url())
            if button:
                browser.submit(button)
            self.assertIn("Asker asks", Page(browser.sign_out().text).main)
            self.assertIn("the health record of Joseph Ross", browser.sign_in("joseph-ross").text)


class PickerPage(PortalTest):
    """Whose record, when there are many."""
    def setUp(self) -> None:
        super().setUp()
        with self.portal.portal.state.transaction() as database:
            database.executemany(
                "INSERT INTO patients (username, patient_id, name, is_user) VALUES ('joseph-ross', ?, ?, 0)",
                [(f"p-{number}", f"Child {number}") for number in range(40)])
        self.browser = signed_in(self.portal, App(self.portal).authorize_url(), "joseph-ross")

    def test_many_patients_come_with_a_search(self) -> None:
        page = Page(self.browser.page.text)
        self.assertEqual(len(page.patients()), s4s.MANY_PATIENTS)
        self.assertIn("of 41 patients", page.main)
        self.assertEqual(Page(self.browser.submit("Search", q="child 37").text).patients(), ["p-37"])
        self.assertIn("the health record of Child 37", self.browser.submit("p-37", form=1).text)

    def test_each_record_comes_with_a_birth_date_and_ones_own_is_said_to_be(self) -> None:
        texts = Page(self.browser.page.text).texts["button"]
        self.assertEqual(texts[2], "Joseph Rossyour own record; born 2003-10-02")
        self.assertNotIn("your own", "".join(texts[3:]))

    def test_a_search_that_finds_nobody_can_be_changed(self) -> None:
        page = Page(self.browser.submit("Search", q="<nobody>").text)
        self.assertIn("is called '<nobody>'", page.main)
        self.assertTrue(page.all("input", name="q", value="<nobody>"))


class ErrorPage(PortalTest):
    """What a person sees when something goes wrong."""
    def test_it_says_what_was_expected_what_came_and_what_to_read(self) -> None:
        page = Page(self.at("/oauth/authorize?client_id=demo-app&redirect_uri=http://x.example/").text)
        self.assertIn(f"{self.portal.url}/demo", page.main)
        self.assertIn("redirect_uri = http://x.example/", page.main)
        self.assertTrue(page.all("a", href="https://www.rfc-editor.org/rfc/rfc6749#section-4.1.1"))

    def test_no_form_field_is_shown(self) -> None:
        answer = self.at("/login", form={"username": "daniel-adams", "password": "do not show"})
        self.assertEqual(answer.status, 403)
        self.assertNotIn("do not show", answer.text)


class StartPage(PortalTest):
    """GET /"""
    def setUp(self) -> None:
        super().setUp()
        self.page = Page(self.at("/").text)

    def test_it_names_every_endpoint_and_its_text_and_what_is_open_to_anyone(self) -> None:
        self.assertEqual(self.page.all("details"), [{"class": "card"}])  # closed
        for route in s4s.ROUTES:
            self.assertIn(route.path.replace("{}", "..."), self.page.texts["details"][0])
            self.assertIn(route.spec, self.page.main)
            self.assertNotRegex(s4s.what_it_does(route), r"`|\bNone\b|create_|Error")  # words for people
        self.assertIn("tokens for any account", self.page.main)
        with s4s.Server(debug=False, open_fhir=False) as closed:
            self.assertNotRegex(ask(closed.url + "/").text,
                                "tokens for any account|every record, at|/oauth/debug|/api/open-fhir|/launch")

    def test_it_says_who_may_open_what_and_shows_the_demo_clients_secrets_and_no_others(self) -> None:
        for words in ("daniel-adams opens Daniel Adams, Amy Shaw", "clinician opens any record",
                      "test-suite, its secret demo-secret-s4s", self.portal.fhir_url, "FHIR versionR4"):
            self.assertIn(words, self.page.main)
        other = {"client_id": "api-test", "client_secret": "other", "redirect_uris": ["https://app.example/"]}
        with s4s.Server(client="mine:hush=https://app.example/", fixtures={"clients": [other]}) as portal:
            portal.register_client(redirect_uris=["https://app.example/cb"], client_name="Stranger")
            page = ask(portal.url + "/").text
            self.assertIn("mine", page)
            self.assertNotRegex(page, "hush|Stranger|other<|api-secret")

    def test_its_links_lead_somewhere(self) -> None:
        for path in {link["href"] for link in self.page.all("a") if link["href"].startswith("/")}:
            self.assertIn(self.at(path).status, (200, 303), path)

    @unittest.skipUnless(os.name == "posix" and shutil.which("curl"), "needs a shell and curl")
    def test_its_commands_work_when_pasted(self) -> None:
        self.assertEqual(json.loads(output_of("sh", "-c", self.page.texts["pre"][0]))["id"], DANIEL)

    def test_it_is_the_home_of_who_is_signed_in(self) -> None:
        browser = signed_in(self.portal)
        self.assertIn("Daniel Adams, Amy Shaw", Page(browser.open(self.portal.url + "/").text).main)
        self.assertNotIn("Welcome", browser.sign_out().text)


# ######################################################################## 24 demo app

class DemoApp(PortalTest):
    """GET /demo, and the client that it is."""
    def test_it_is_a_public_client_like_any_other_and_needs_pkce(self) -> None:
        app = App(self.portal, "openid fhirUser launch/patient patient/*.rs offline_access")
        app.client_id, app.secret, app.redirect_uri = "demo-app", "", self.portal.url + "/demo"
        tokens = app.tokens(patient_id=AMY)
        self.assertEqual((tokens["patient"], tokens["scope"]), (AMY, app.scope))
        self.assertIn("refresh_token", tokens)
        self.assertEqual(ask(app.authorize_url(code_challenge=None)).location["error"], "invalid_request")

    def test_it_talks_to_this_server_alone_and_no_browser_keeps_what_it_read(self) -> None:
        policy = self.at("/demo").headers["content-security-policy"]
        self.assertIn("connect-src 'self';", policy)
        self.assertNotIn("http", policy)
        token = self.portal.issue_token(scope="patient/*.rs")
        for path in (f"Patient/{DANIEL}", f"Observation?patient={DANIEL}"):
            self.assertEqual(self.fhir(path, token).headers.get("cache-control"), "no-store", path)

    def test_it_knows_the_servers_public_name(self) -> None:
        with s4s.Server(base_url="https://smart.example/s4s") as behind:
            page = Page(ask(f"{behind.address}/demo").text)
            self.assertEqual(page.all("div", id="app")[0]["data-base"], "https://smart.example/s4s")
            self.assertTrue(page.all("a", href="/s4s/apps"))

    PLAIN_PAGE = """
        const elements = {};
        const make_element = (_, name) => ({name, attributes: {}, children: [], setAttribute(key, value) {
          this.attributes[key] = value; }, append(...more) { this.children.push(...more); },
          replaceChildren(...all) { this.children = all; }, dataset: {base: 'http://x'},
          focus() { elements.focused = this; }, set textContent(text) { this.children = [text]; }});
        const document = {createElementNS: make_element, createElement: make_element,
          getElementById: id => elements[id] ??= make_element('', id)};
        const location = {href: '', search: '', replace() {}}, window = {matchMedia: () => ({matches: true})};
        const setInterval = () => 0, fetch = async () => ({ok: false, status: 401, text: async () => ''});
        const text = element => typeof element === 'object' ? element.children.map(text).join(' ') : element;
        const all = (element, name) => typeof element !== 'object' ? [] : [
          ...[element].filter(one => one.name === name), ...element.children.flatMap(one => all(one, name))];
        """

    def run_script(self, acts: str) -> Any:
        """Run some lines within the app's script, in node, with as much of a page as they need."""
        script = s4s.DEMO_SCRIPT.replace("'use strict';", "")
        return json.loads(output_of("node", "-", given=f"{self.PLAIN_PAGE}{script}{acts}"))

    @unittest.skipUnless(shutil.which("node"), "needs node")
    def test_a_blood_pressure_is_one_chart_of_two_lines_and_says_its_values_and_a_test_its_name(self) -> None:
        got = self.run_script("""
            const measured = (text, display, when, ...values) => ({code: {text, coding: [{display}]},
              effectiveDateTime: when, component: values.map(([name, value]) => ({code: {text: name},
                valueQuantity: {value, unit: 'mm[Hg]'}}))});
            const table = measurements([
              measured('BP', 'BP', '2020-01-02', ['Systolic', 120], ['Diastolic', 80]),
              measured('Creatinine', 'Creat SerPl-mCnc', '2020-01-02', ['', 1]),
              measured('BP', 'BP', '2019-01-02', ['Systolic', 111], ['Diastolic', 70])]);
            const [svg] = all(table, 'svg'), [figure] = all(table, 'figure');
            console.log(JSON.stringify({
              row: all(table, 'td').filter((_, at) => at < 6 && at !== 4).map(text),
              legend: all(table, 'figcaption').map(text), lines: all(svg, 'polyline').length,
              tabindex: figure.attributes.tabindex, values: all(figure, 'li').map(text),
              ticks: all(svg, 'text').map(text)}));""")
        self.assertEqual([" ".join(words.split()) for words in got["row"]],
                         ["BP", "120 / 80 mm[Hg]", "no range", "2020-01-02", "Creatinine Creat SerPl-mCnc"])
        self.assertEqual(got["legend"], ["\u25cf Systolic \u25cb Diastolic"])
        self.assertEqual((got["lines"], got["tabindex"]), (2, 0))
        self.assertEqual(got["values"], ["2019-01-02: 111 / 70 mm[Hg]", "2020-01-02: 120 / 80 mm[Hg]"])
        self.assertEqual(got["ticks"], ["60", "80", "100", "120", "2019-01", "2019-07", "2020-01"])

    @unittest.skipUnless(shutil.which("node"), "needs node")
    def test_after_revoking_it_says_so_everywhere_and_the_focus_has_a_place(self) -> None:
        got = self.run_script("""
            kept = {asked: {scope: 'a'}, config: {revocation_endpoint: 'http://x/r'}, iss: 'http://x'};
            token = {access_token: 'a', refresh_token: 'r', scope: 'a', patient: 'p'};
            run(revoke()).then(() => console.log(JSON.stringify({focus: elements.focused.name,
              status: text(elements.status), granted: text(elements.granted)})));""")
        self.assertEqual(got["focus"], "status")
        self.assertIn("Revoked", got["status"])
        self.assertIn("Refresh token revoked", got["granted"])

    def test_its_steps_cite_their_texts(self) -> None:
        for text in ("RFC 8414", "RFC 7636", "RFC 6749 section 4.1.1", "RFC 9207", "RFC 6749 section 4.1.3",
                     "RFC 6750", "RFC 6749 section 6", "RFC 7009", "OpenID Connect Core"):
            self.assertIn(text, s4s.DEMO_SCRIPT)


# ######################################################################## 25 settings, seeds, the portal

class Fixtures(Test):
    """--fixtures and --client: users and apps that are there from the start."""
    users: ClassVar[list[Any]] = [{
        "username": "maria", "password": "secret", "name": "Maria Silva", "fhir_user": f"Patient/{JOSEPH}",
        "patients": [{"patient_id": JOSEPH, "name": "Joseph Ross", "is_user": True}, {"patient_id": AMY}]}]

    def test_a_user_signs_in_and_opens_the_records_named(self) -> None:
        path = Path(self.during(tempfile.TemporaryDirectory()), "fixtures.json")
        path.write_text(json.dumps({"users": self.users}), "utf-8-sig")  # as Windows' editors write
        for fixtures in ({"users": self.users}, str(path)):
            with self.subTest(fixtures=fixtures), s4s.Server(fixtures=fixtures) as portal:
                app, browser = App(portal), Browser(portal)
                browser.open(app.authorize_url())
                self.assertIn("Joseph Ross", browser.sign_in("maria", "secret").text)
                browser.submit(AMY)
                code = browser.submit("authorize").location["code"]
                self.assertEqual(app.exchange(code).json["patient"], AMY)
                portal.reset()
                self.assertEqual(portal.issue_token(username="maria")["patient"], JOSEPH)

    def test_a_record_is_opened_by_whatever_name(self) -> None:
        for name in ("\U0001f642", "***", " "):
            user = {"username": "u", "password": "u", "patients": [{"patient_id": AMY, "name": name}]}
            with s4s.Server(fixtures={"users": [user]}) as portal:
                self.assertEqual(App(portal).tokens("u", patient_id=AMY)["patient"], AMY)

    def test_a_reset_leaves_no_claim_of_a_user_who_is_in_the_fixtures_no_more(self) -> None:
        path = os.path.join(self.during(tempfile.TemporaryDirectory()), "state.db")
        eve = {"username": "eve", "password": "e", "email": "old-eve@x.example",
               "claims": {"locale": "pt"}}
        for users, told in (([eve], "old-eve@x.example"), ([], None)):
            with s4s.Server(db=path, fixtures={"users": users}) as portal:
                portal.reset()
                portal.load(made("Patient/eve", name=[{"text": "Eve New"}]))
                token = portal.issue_token(username="eve", scope="openid profile email")
                got = ask(portal.url + "/oauth/userinfo", token=token).json
                self.assertEqual((got.get("email"), got.get("locale") == "pt"), (told, bool(told)))

    def test_a_patient_who_was_loaded_signs_in_by_id(self) -> None:
        with s4s.Server() as portal:
            portal.load({"resourceType": "Patient", "id": "p1", "name": [{"text": "Pia One"}]})
            browser, app = Browser(portal), App(portal)
            browser.open(app.authorize_url())
            self.assertIn("Pia One", browser.sign_in("p1").text)
            self.assertEqual(app.exchange(browser.submit("authorize").location["code"]).json["patient"], "p1")
            for username in ("p2", DANIEL):
                with self.subTest(username=username), self.assertRaises(s4s.PortalError):
                    portal.issue_token(username=username)

    def test_clients_are_there_with_their_secrets_and_labels_whatever_their_ids(self) -> None:
        clients = [{"client_id": "mine", "client_secret": "s", "redirect_uris": [App.redirect_uri],
                    "client_name": "Mine", "security_labels": ["allergy", "problems"],
                    "launch_uris": ["https://app.example/launch"]},
                   {"client_id": "open", "redirect_uris": [App.redirect_uri]},
                   {"client_id": "1PpG/Q 1", "client_secret": "s", "redirect_uris": [App.redirect_uri]}]
        with s4s.Server(fixtures={"clients": clients}, client="a b=https://x.example/") as portal:
            self.assertTrue(portal.portal.client("a b"))
            app, browser = App(portal), Browser(portal)
            for client_id, secret, sent in (  # plain, or encoded (RFC 6749 section 2.3.1)
                    ("open", "", "open"), ("1PpG/Q 1", "s", "1PpG/Q 1"), ("1PpG/Q 1", "s", "1PpG%2FQ+1"),
                    ("mine", "s", "mine")):
                app.client_id, app.secret = client_id, secret
                code, app.client_id = app.code(), sent
                self.assertEqual(app.exchange(code).status, 200, sent)
            browser.open(app.authorize_url())
            browser.sign_in()
            browser.submit(DANIEL)
            offered = [value for name, value in Form(browser.page.text).fields if name == "security_labels"]
            self.assertEqual(offered, ["allergies", "problems"])
            self.assertTrue(portal.launch(client_id="mine").startswith("https://app.example/launch?"))

    def test_a_file_that_can_not_be_is_refused_in_words(self) -> None:
        def user(**members: Any) -> Any:
            return {"users": [{**self.users[0], **members}]}

        def client(**members: Any) -> Any:
            return {"clients": [{"client_id": "a", "redirect_uris": ["x:/y"], **members}]}
        for fixtures, needle in (([], "not a JSON object"), ({"user": []}, "unknown member user"),
                ({"users": {}}, "not an array"), ({"users": [1]}, r"users\[0\]"),
                (user(username=""), "no username"), (user(username="a b"), "username"),
                (user(password=5), r"users\[0\]: password is not a string"),
                (user(patients=[{}]), r"users\[0\].patients\[0\] has no patient_id"),
                (user(patients=[{"is_user": 1}]), "is_user is not true or false"),
                (user(patients=[{"patient_id": "a b"}]), r"patients\[0\]: patient_id 'a b' is no id of FHIR"),
                (user(age=5), "unknown member age"), (user(email=[1]), "email is not a string"),
                (user(claims=[1]), "claims is not an object"), (user(name="\ud800"), "fixtures"),
                (user(name=b"x"), "fixtures"), ({"clients": [7]}, r"clients\[0\] is not"),
                ({"clients": [{}]}, r"clients\[0\]: client_id"), (client(client_secret=""), "client_secret"),
                ({"clients": [{"client_id": "a"}]}, r"clients\[0\]: redirect_uris"),
                (client(client_id="a\tb"), r"clients\[0\]: client_id"),
                (client(token_endpoint_auth_method="client_secret_post"), "without a client_secret"),
                (client(token_endpoint_auth_method="none", client_secret="s"), "but a client_secret"),
                ("/nowhere/fixtures.json", "/nowhere/fixtures.json"), (str(HERE / "LICENSE"), "LICENSE: E")):
            with self.subTest(fixtures=fixtures), self.assertRaisesRegex(s4s.StartError, needle):
                s4s.Server(fixtures=fixtures).start()

    def test_a_client_given_again_gets_one_more_redirect_uri(self) -> None:
        given = ["a:s=https://1.example/", "a=https://2.test/?x=:2", "test-suite=https://x.example/"]
        with s4s.Server(client=given) as portal:
            client: Any = portal.portal.client("a")
            self.assertTrue(client.secret_hash)
            self.assertEqual(client.metadata["redirect_uris"], ["https://1.example/", "https://2.test/?x=:2"])
            self.assertEqual(portal.issue_token()["scope"], "launch/patient patient/*.read offline_access")

    def test_an_option_that_can_not_be_or_holds_a_separator_is_refused_without_its_secret(self) -> None:
        uri = "https://a.example/"
        for needle, *given in (("--client a: ", "a"), ("a: redirect_uris", "a:hush=javascript:x"),
                ("client_id", f"a\tb={uri}"), ("another secret", f"a:s={uri}", f"a:hush={uri}"),
                ("another secret", f"test-suite:hush={uri}"), *(("--fixtures", text) for text in (
                    f"urn:app:1={uri}", f"a:b:hush:d={uri}", f"a:b=hush={uri}", f"a:hush=={uri}", "a:hush",
                    "a:hush=not a url", "a=hush"))):
            with self.subTest(given=given), self.assertRaisesRegex(s4s.StartError, needle) as caught:
                s4s.Seeds(s4s.Settings(client=given))
            client_id = s4s.printable(re.split("[:=]", given[-1])[0])
            self.assertIn(f"--client {client_id}: ", str(caught.exception))
            self.assertNotIn("hush", str(caught.exception))


# ######################################################################## 26 test controls and Server

class Fixture(PortalTest):
    """s4s_proxy.Server, as tests use it."""
    def read(self, token: Any) -> Answer:
        return self.fhir(f"Patient/{DANIEL}", token)

    def test_advance_moves_every_expiry(self) -> None:
        token = self.portal.issue_token()
        for seconds, status in ((3599, 200), (1.5, 401)):
            self.portal.advance(seconds)
            self.assertEqual(self.read(token).status, status)

    def test_reset_leaves_nothing_of_what_was_made(self) -> None:
        for door in (self.portal.reset, lambda: self.post("/oauth/debug/reset", {}),
                     lambda: self.at("/oauth/debug/reset", method="POST")):
            client = self.portal.register_client(redirect_uris=["https://a.example/"])
            token, now = self.portal.issue_token(), self.portal.advance(10_000)
            answer = door()
            self.assertEqual(answer.status if isinstance(answer, Answer) else 204, 204)
            self.assertLess(self.portal.portal.clock.now(), now)
            self.assertEqual((self.portal.requests, self.read(token).status), ([], 401))
            self.assertIsNone(self.portal.portal.client(client["client_id"]))

    # Control, arguments, what its refusal begins with; its status and error if not the usual ones.
    refused: ClassVar[Any] = (
        *(("issue_token", {name: value}, f"{name}: ") for name, value in (
            ("client_id", "nobody"), ("client_id", 5), ("username", None), ("patient_id", "nobody"),
            ("patient_id", JOSEPH), ("access_lifetime", "soon"), ("access_lifetime", 1e308),
            ("access_lifetime", "nan"), ("access_lifetime", True), ("approval_expires", "inf"),
            ("approval_expires", 1e15), ("approval_expires", []))),
        ("issue_token", {"username": "nobody"}, "username: there is no user 'nobody'"),
        ("issue_token", {"scope": 7}, "scope: expected a string, got 7"),
        ("issue_token", {"scope": "nonsense"}, "scope: nothing of 'nonsense' can be granted",
         400, "invalid_scope"),
        *(("load", {"resource": bad}, words) for bad, words in (
            ({}, "not a FHIR resource"), (made("Nonsense"), "Nonsense: not served"),
            (made("Patient/a/b"), "id: expected a string of 1 to 64"))),
        ("advance", {"seconds": "soon"},
         'seconds: expected a number that keeps the clock from 1970 to 9990, got "soon"'),
        ("fail", {"endpoint": "fhir"},
         "fail: give at least one of status, error, retry_after, delay, drop, change"),
        ("fail", {"endpoint": "authorize", "change": {"a": 1}}, "change: authorize answers with no JSON"),
        *(("fail", {"endpoint": "fhir", "change": {"a": 1}, **more},
           "change: the request succeeds; expected no status, error, retry_after or drop beside it")
          for more in ({"status": 500}, {"error": "x"}, {"drop": True}, {"retry_after": 1})),
        *(("fail", {"endpoint": "token", "status": 500, name: bad}, name + ": ") for name, bad in (
            ("endpoint", "nowhere"), ("status", 399), ("status", 600), ("status", True), ("error", 'a"b'),
            ("error", ""), ("drop", "yes"), ("times", 0), ("times", True), ("times", 1.5),
            ("retry_after", -1), ("change", [1]), ("change", {"x": math.nan}), ("change", {(1,): 1}),
            ("delay", -1), ("delay", "long"))),
        ("fail", {"endpoint": "token", "delay": 301}, "delay: expected 0 to 300 seconds, got 301"),
        *((control, {**needed, name: {1}},
           f"{name}: expected what JSON can say: Object of type set is not JSON serializable")
          for control, needed, name in (("fail", {"endpoint": "fhir"}, "change"),
                                        ("launch", {}, "fhir_context"))))

    def test_a_refused_control_says_why(self) -> None:
        url, other = App(self.portal).authorize_url(), "https://other.example/oauth/authorize"
        asked: Any = (
            ({"url": url.replace("client_id=", "client_id=x")}, "client_id 'x", 400, "invalid_client"),
            ({"patient_id": JOSEPH}, "daniel-adams may not open the record", 403, "forbidden"),
            ({"url": other}, "Host is 'other.example'", 421, "misdirected_request"),
            ({"url": url.replace("/oauth/authorize", "/login")}, "url: "), ({"deny": 0}, "deny: "),
            ({"username": "nobody"}, "username: there is no user 'nobody'"),
            *(({"security_labels": bad}, "security_labels: ") for bad in (["nonsense"], [], "problems")),
            ({"approval_expires": "never"}, "approval_expires: 'never' is no date"))
        for control, how, description, *told in (*self.refused, *(
                ("approve", {"url": url, "username": "daniel-adams", **how}, *told) for how, *told in asked)):
            with self.subTest(control=control, how=how), self.assertRaises(s4s.PortalError) as caught:
                getattr(self.portal, control)(**how)
            refused = caught.exception
            self.assertEqual([refused.status, refused.error], told or [400, "invalid_request"])
            self.assertTrue(refused.description.startswith(description), refused.description)

    def test_approve_gives_the_redirect_errors_too(self) -> None:
        app = App(self.portal)
        self.assertIn("=invalid_scope", self.portal.approve(app.authorize_url(scope="x"), "daniel-adams"))
        self.assertIn("=access_denied", self.portal.approve(app.authorize_url(), "daniel-adams", deny=True))
        self.portal.fail("authorize", error="temporarily_unavailable")
        self.assertIn("=temporarily_unavailable", self.portal.approve(app.authorize_url(), "daniel-adams"))

    def test_faults_hit_the_next_requests_and_queue_and_some_last_and_a_drop_has_no_answer(self) -> None:
        app = App(self.portal)
        code = app.code()
        self.portal.fail("token", error="invalid_grant")
        self.assertEqual(app.exchange(code).json["error"], "invalid_grant")
        self.assertEqual(app.exchange(code).status, 200)
        self.portal.fail("metadata", status=503, retry_after=7, times=2)
        self.portal.fail("metadata", status=500, times=None)
        answers = [self.fhir("metadata") for _ in range(5)]
        self.assertEqual([answer.status for answer in answers], [503, 503, 500, 500, 500])
        self.assertEqual(answers[0].headers["retry-after"], "7")
        self.portal.reset()
        self.assertEqual(self.fhir("metadata").status, 200)
        self.portal.fail("discovery", drop=True)
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.fhir(".well-known/smart-configuration")

    def test_an_answer_is_right_but_for_the_members_that_a_test_changes(self) -> None:
        app, url = App(self.portal, "openid fhirUser patient/*.rs"), self.portal.url
        token, wrong = app.tokens()["access_token"], {"expires_in": "3600", "scope": None}
        ordered = self.post("/oauth/debug/fail", {"endpoint": "token", "change": wrong, "delay": 0.01})
        self.assertEqual(ordered.status, 200)
        tampered, right = (app.exchange(app.code()).json for _ in range(2))
        self.assertEqual((tampered["expires_in"], right["expires_in"]), ("3600", 3600))
        self.assertEqual(tampered.keys(), right.keys() - {"scope"})
        look, itself = {"form": {"token": token}}, (app.client_id, app.secret)
        rows: list[tuple[str, str, dict[str, Any]]] = [
            ("introspect", "/oauth/introspect", look), ("userinfo", "/oauth/userinfo", {}),
            ("register", "/oauth/register", {"data": {"redirect_uris": ["https://a.example/"]}}),
            ("revoke", "/oauth/revoke", {"form": {"token": "x"}, "token": "", "basic": itself}),
            ("jwks", "/oauth/jwks", {}), ("discovery", "/.well-known/openid-configuration", {}),
            ("discovery", "/api/fhir/.well-known/smart-configuration", {}),
            ("metadata", "/api/fhir/metadata", {}), ("open_fhir", "/api/open-fhir/Condition", {}),
            ("fhir", "/api/fhir/Condition", {}), ("fhir", f"/api/fhir/Patient/{DANIEL}", {})]
        for endpoint, path, how in rows:
            with self.subTest(path):
                self.portal.fail(endpoint, change={"é": [1.5, None]})
                self.portal.fail(endpoint, change={"é": None})
                tampered, *same = (ask(url + path, **{"token": token, **how}) for _ in range(3))
                self.assertEqual(tampered.json["é"], [1.5, None])
                self.assertEqual({answer.status for answer in same}, {tampered.status})
                for answer in same if endpoint != "register" else ():  # there each answer has another id
                    self.assertEqual({**answer.json, "é": [1.5, None]}, tampered.json)

    def test_a_changed_answer_waits_its_turn_and_an_error_or_no_json_stays_as_it_is(self) -> None:
        token, right = self.portal.issue_token(), f'"{DANIEL}"'
        etag = self.fhir(f"Patient/{DANIEL}", token).headers["etag"]
        self.portal.fail("fhir", status=500)
        self.portal.fail("fhir", change={"id": "wrong"}, times=3)
        for name, headers, status, shown in ((DANIEL, {}, 500, "a test made"),
                (AMY, {}, 403, "OperationOutcome"), (DANIEL, {"If-None-Match": etag}, 304, ""),
                (DANIEL, {}, 200, '"wrong"'), (DANIEL, {}, 200, right)):
            with self.subTest(status=status, shown=shown):
                got = self.fhir(f"Patient/{name}", token, headers=headers)
                self.assertEqual((got.status, shown in got.text, "wrong" in got.text),
                                 (status, True, "wrong" in shown))

    def test_requests_show_what_the_app_sent(self) -> None:
        app = App(self.portal)
        app.tokens()
        seen = self.portal.requests[-1]
        self.assertEqual((seen.method, seen.path, seen.status, seen.client_id),
                         ("POST", "/oauth/token", 200, app.client_id))
        self.assertIn(app.verifier, seen.body)

    def test_a_fault_looks_like_the_real_error(self) -> None:
        token = self.portal.issue_token()
        for endpoint, error, status, challenge in (
                ("fhir", "insufficient_scope", 403, 'Bearer realm="s4s", error="insufficient_scope"'),
                ("fhir", "invalid_token", 401, 'Bearer realm="s4s", error="invalid_token"'),
                ("token", "invalid_client", 401, 'Basic realm="s4s"')):
            with self.subTest(endpoint=endpoint, error=error):
                self.portal.fail(endpoint, error=error)
                got = self.read(token) if endpoint == "fhir" else App(self.portal).exchange("x")
                self.assertEqual((got.status, got.headers["www-authenticate"]), (status, challenge))
        self.portal.fail("fhir", status=503)
        self.assertEqual(self.read(token).json["issue"][0]["code"], "transient")
        self.portal.fail("fhir", error="invalid_token", status=418)
        self.assertEqual(self.read(token).status, 418)

    def test_anyone_without_a_record_must_name_a_patient_and_types_must_be_fhirs(self) -> None:
        with self.assertRaisesRegex(s4s.PortalError, "patient_id is missing"):
            self.portal.issue_token(username="clinician")
        rows: Any = (("patient", AMY, {"username": "clinician", "patient_id": AMY}),
                     ("patient", None, {"username": "clinician", "scope": "user/*.rs"}),
                     ("scope", "patient/Patient.rs", {"scope": "patient/Nonsense.rs patient/Patient.rs"}))
        for name, expected, how in rows:
            self.assertEqual(self.portal.issue_token(**how).get(name), expected)

    def test_two_servers_know_nothing_of_each_other(self) -> None:
        with s4s.Server() as other:
            self.assertEqual(self.read(other.issue_token()).status, 401)

    def test_stop_leaves_nothing_and_is_safe_twice_and_a_start_may_follow(self) -> None:
        before, server = {*threading.enumerate()}, s4s.Server()
        for _ in range(2):
            self.assertEqual(ask(server.start().url + "/health").status, 200)
            with self.assertRaisesRegex(s4s.StartError, "running already"):
                server.start()
            server.stop()
            server.stop()
            self.assertLessEqual({*threading.enumerate()}, before)
            with self.assertRaises(OSError):
                ask(server.url + "/health")


    def test_a_stop_takes_three_seconds_at_most_however_many_requests_are_stuck(self) -> None:
        now, server = [0.0], s4s.Server().start()

        class Stuck:
            def join(self, seconds: float) -> None:
                now[0] += seconds
        threads = cast(Any, server._listener)._threads_of_connections
        threads.update(Stuck() for _ in range(12))
        with mock.patch.object(time, "monotonic", lambda: now[0]):
            server.stop()
        self.assertEqual(now, [3])


class DebugTokens(PortalTest):
    """POST /oauth/debug/token, GET /oauth/debug/introspect (S4S)."""
    def token(self, **members: Any) -> Answer:
        members = {"client_id": "test-suite", "username": "daniel-adams", **members}
        return self.post("/oauth/debug/token", members)

    def look(self, token: str) -> Any:
        return self.at(f"/oauth/debug/introspect/?token={token}").json

    def test_a_client_that_a_reset_takes_away_meanwhile_gets_none(self) -> None:
        gone = App(self.portal).client_id
        with doing(s4s, "served_scope", after=self.portal.reset):
            got = self.token(client_id=gone)
        self.is_error(got, "invalid_client", 401)
        self.assertIn("www-authenticate", got.headers)

    def test_a_token_opens_the_users_own_record_and_members_may_be_said_in_several_ways(self) -> None:
        got = self.token().json
        self.assertEqual([got[name] for name in ("token_type", "expires_in", "scope", "patient")], [
            "Bearer", 3600, "launch/patient patient/*.read offline_access", DANIEL])
        self.assertEqual(self.fhir(f"Patient/{DANIEL}", got).json["id"], DANIEL)
        for members, name, expected in (
                ({"user_name": "joseph-ross"}, "patient", JOSEPH), ({"patient_id": AMY}, "patient", AMY),
                ({"access_lifetime": "60", "approval_expires": f"{time.time() + 99.5}"}, "expires_in", 60)):
            self.assertEqual(self.token(**members).json[name], expected, members)

    def test_a_token_may_be_born_expired(self) -> None:
        for members in ({"access_lifetime": 0}, {"access_lifetime": -5}, {"access_lifetime": -1e300},
                        {"approval_expires": 1_000_000_000}, {"approval_expires": -1}):
            with self.subTest(members=members):
                got = self.token(**members)
                self.assertEqual((got.status, got.json["expires_in"]), (200, 0))
                self.assertEqual(self.fhir(f"Patient/{DANIEL}", got.json).status, 401)
                self.assertIs(self.look(got.json["access_token"])["active"], False)

    def test_an_access_token_and_its_refresh_token_show_the_same_also_when_it_has_expired(self) -> None:
        given = self.portal.issue_token(approval_expires=1527806923 + 10 ** 9)
        first = self.look(given["access_token"])
        self.portal.advance(3601)
        for seen in (first, self.look(given["refresh_token"])):
            self.assertRegex(seen.pop("access_expires"), r"^\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT$")
            self.assertEqual(seen, {
                **{name: given[name] for name in ("access_token", "refresh_token", "scope", "token_type")},
                "active": True, "client_id": "test-suite", "username": "daniel-adams", "security_labels": [],
                "approval_expires": "Mon, 07 Feb 2050 00:35:23 GMT"})
        self.assertEqual({**self.look(given["access_token"]), "active": 0}, {
            **self.look(given["refresh_token"]), "active": False})

    def test_an_unknown_token_is_just_inactive_and_one_must_be_given(self) -> None:
        self.assertEqual(self.look("nothing"), {"active": False})
        self.assertIn("token", self.look("")["error_description"])


class Drift(PortalTest):
    """Each control has two doors; they must not drift apart."""
    def test_methods_and_http_take_the_same_names_and_defaults(self) -> None:
        paths = {route.endpoint.__name__: route.path for route in s4s.ROUTES if "POST" in route.methods}
        self.assertEqual({name for name in paths if name.startswith("debug_")},
                         {f"debug_{name}" for name in s4s.CONTROLS})
        for name, function in s4s.CONTROLS.items():
            self.assertIs(getattr(s4s.Server, name), function)  # so the defaults are the same ones
            parameters = list(inspect.signature(function).parameters.values())[1:]
            needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
            if name == "issue_token":  # the one difference: see the contract of the two doors
                defaults = [parameter.default for parameter in parameters[:2]]
                self.assertEqual(defaults, ["test-suite", "daniel-adams"])
                needed = ["client_id", "username"]
            if name == "load":  # its body is the parameter, as a whole
                continue
            names = ", ".join(parameter.name for parameter in parameters) or "nothing"
            cases = [({"strange": "x"}, f"strange: unknown; {name} takes {names}")]
            cases += [({other: "x" for other in needed if other != missing}, f"{missing} is missing")
                      for missing in needed]
            for members, description in cases:
                with self.subTest(control=name, members=members):
                    got = self.post(paths[f"debug_{name}"], members)
                    self.assertEqual((got.status, got.json["error_description"]), (400, description))

    def test_a_door_over_http_gives_what_the_method_gives(self) -> None:
        app = App(self.portal, launch_uris=["https://app.example/launch?own=1&launch=no"])
        asked = {"url": app.authorize_url(), "username": "daniel-adams"}
        back = self.post("/oauth/debug/authorize", asked).json["redirect_to"]
        self.assertEqual(app.exchange(query_of(back)["code"]).json["patient"], DANIEL)
        launched = self.post("/oauth/debug/launch", {"client_id": app.client_id}).json
        self.assertEqual(launched["launch_url"], "https://app.example/launch?own=1&launch=no&" + urlencode(
            {"iss": launched.pop("iss"), "launch": launched.pop("launch")}))
        self.assertEqual(list(launched), ["launch_url"])
        now = self.post("/oauth/debug/clock", {"seconds": 7200}).json["now"]
        self.assertAlmostEqual(self.portal.advance(0), now, delta=60)
        got = self.post("/oauth/debug/fail", {"endpoint": "token", "error": "invalid_grant", "times": 2})
        self.assertEqual(got.json, {"endpoint": "token", "times": 2})
        self.assertEqual(app.refresh("x").json["error_description"], "a test made this request fail")

    def test_a_control_names_the_server_as_its_caller_does(self) -> None:
        names = ["http://portal.example", "http://smart:8000"]
        with s4s.Server(base_url=names) as named:
            for portal, host, name in (
                    (self.portal, "localhost", "http://localhost"), (self.portal, "[::1]", "http://[::1]"),
                    (self.portal, "", self.portal.url), (named, "smart:8000", names[0])):
                app = App(portal, launch_uris=["https://app.example/launch"])
                given: Any = {"launch": {"client_id": app.client_id},
                    "token": {"client_id": app.client_id, "username": "daniel-adams"},
                    "authorize": {"username": "daniel-adams", "url": app.authorize_url(aud=None)}}
                if host:
                    launch, token, approve = (
                        ask(f"{portal.address}/oauth/debug/{path}", data=members, headers={"Host": host}).json
                        for path, members in given.items())
                    launch_url, back = launch["launch_url"], approve["redirect_to"]
                else:
                    launch_url, back = portal.launch(**given["launch"]), portal.approve(**given["authorize"])
                    token = portal.issue_token(**given["token"])
                issuers = [introspected(app, tokens["access_token"])["iss"] for tokens in (
                    token, app.exchange(query_of(back)["code"]).json)]
                told = [query_of(launch_url)["iss"], *issuers]
                self.assertEqual(told, [name + "/api/fhir", name, name], host)

    def test_every_door_is_shut_where_debug_is_off_as_it_is_where_others_can_reach_the_server(self) -> None:
        for host, debug, served in (("127.0.0.1", None, True), ("0.0.0.0", None, False),
                                    ("0.0.0.0", True, True), ("127.0.0.1", False, False)):
            self.assertEqual(s4s.Settings(host=host, debug=debug).serves_debug, served)
        with s4s.Server(debug=False) as portal:
            for route in s4s.ROUTES:
                if route.kind == "debug":
                    with self.subTest(path=route.path):
                        got = ask(portal.url + route.path, method=route.methods[0], data={})
                        self.is_error(got, "not_found", 404)


class Secrets(PortalTest):
    """Nothing that the server writes for people or monitors holds a secret."""
    own = ("correct horse battery", "päss/wörd", "tea & 2+2=5", "ab c")
    settings: ClassVar[dict[str, Any]] = {"quiet": False, "verbose": True, "fixtures": {"clients": [
        {"client_id": f"own-{number}", "client_secret": secret, "redirect_uris": ["https://a.example/"]}
        for number, secret in enumerate(own)]}}
    secrets: dict[str, str]  # value -> name of each
    written: list[str]       # every text that must hold none of them
    named = re.compile("(access|refresh|id|form)_token|.*secret|.*assertion|code(_verifier)?|launch|password")
    harmless = re.compile("/api/|/health|/oauth/userinfo|/oauth/jwks|/.well-known/|/oauth/debug/requests")

    def setUp(self) -> None:
        super().setUp()
        self.lines = log_of(self.portal)

    def test_a_whole_run_leaves_no_secret_in_logs_errors_or_lists(self) -> None:
        for level in ({"quiet": True}, {"quiet": False}, {"quiet": False, "verbose": True}):
            self.secrets, self.written = {}, []
            with self.subTest(level=level):
                with contextlib.redirect_stderr(io.StringIO()) as log, \
                        mock.patch.dict(globals(), {"ask": functools.partial(self.watched, ask)}):
                    self.run_everything(level)
                self.assertIn("BUG RuntimeError", log.getvalue())
                self.assertGreater(len(self.secrets), 25)
                self.assertGreater(len(self.written), 30)
                for text in [*self.written, log.getvalue()]:
                    for secret, name in self.secrets.items():
                        self.assertNotIn(secret.lower(), text.lower(), f"{name}: {text[:200]}")

    def watched(self, ask: Callable[..., Answer], url: str, **how: Any) -> Answer:
        """Ask; remember the secrets sent and answered, and what must hold none."""
        answer, form = ask(url, **how), dict(how.get("form") or ())
        fields = [*form.items(), *re.findall('name="(form_token)" value="([^"]+)"', answer.text)]
        fields += [("cookie", cookie.partition(";")[0].partition("=")[2]) for cookie in answer.cookies]
        fields += answer.location.items() if "location" in answer.headers else ()
        with contextlib.suppress(ValueError):
            fields += answer.json.items()
        self.secrets.update((value, name) for name, value in fields if value and (
            name == "cookie" or self.named.fullmatch(name)))
        if "basic" in how:
            self.secrets[base64.b64encode(":".join(how["basic"]).encode()).decode()] = "basic"
        refused = answer.status >= 400 and "<form" not in answer.text and "/nothing/" not in url
        if refused or self.harmless.match(urlsplit(url).path):
            self.written.append(answer.text + repr(answer.headers))
        return answer

    def test_the_story_of_a_flow_names_sections_and_no_secret(self) -> None:
        app, public = App(self.portal), App(self.portal, token_endpoint_auth_method="none")
        body = {"url": app.authorize_url(), "username": "daniel-adams"}
        back = self.post("/oauth/debug/authorize", body).json["redirect_to"]
        self.assertIn("RFC 7636", self.lines.pop(), "of the browser that the portal plays, too")
        Browser(self.portal).open(app.authorize_url())
        tokens = app.exchange(query_of(back)["code"]).json
        for patient_id in (DANIEL, AMY):
            self.fhir(f"Patient/{patient_id}", tokens)
        public.refresh("x")
        story = "\n".join(self.lines)
        for needle in ("GET /oauth/authorize 303", "RFC 7636", "RFC 6749 section 4.1.3",
                       "POST /oauth/token 200", f"GET /api/fhir/Patient/{AMY} 403",
                       "a public client, its id is no proof"):
            self.assertIn(needle, story)
        for secret in (query_of(back)["code"], tokens["access_token"], tokens["refresh_token"], app.secret,
                       app.verifier):
            self.assertNotIn(secret, story)

    def test_no_client_writes_a_line_of_the_log(self) -> None:
        log = io.StringIO()
        with contextlib.redirect_stderr(log), s4s.Server(verbose=True) as portal:
            ask(App(portal).authorize_url(scope="patient/*.rs \r\nGET /forged 200\x1b[2J\u2028", state="\n"))
            ask(f"{portal.fhir_url}/Patient/%0aGET%20/forged", token=portal.issue_token())
            form = {"grant_type": "refresh_token"}
            ask(portal.url + "/oauth/token", basic=("\nGET /forged", "\n"), form=form)
        self.assertGreater(log.getvalue().count("\n"), 6)
        for line in log.getvalue().removesuffix("\n").split("\n"):
            self.assertRegex(line, r"^(GET|POST|    )[ -~]+$")
            self.assertFalse(line.startswith("GET /forged"), line)

    def test_what_was_given_out_is_hidden_wherever_it_stands(self) -> None:
        app, browser = App(self.portal, launch_uris=["https://app.example/launch"]), Browser(self.portal)
        old = self.dead_secrets(self.portal, app, browser)
        browser.sign_in()
        tokens, code = app.tokens(), app.code()
        launch = self.portal.launch(client_id=app.client_id).rpartition("=")[2]
        given = [tokens["access_token"], tokens["refresh_token"], code, app.secret, launch, *old,
                 *browser.cookies.values(), "demo-secret-s4s"]
        self.portal.portal.recorded.clear()
        self.lines.clear()
        for secret in given:
            for text in (secret, secret.replace("-", "%2D"), f"x={secret}", f"x%3D{secret}",
                         f"{secret}=1", f"next=%2Fa%3Fb%3D{secret}%26c",
                         f"11111111-1111-1111-1111-2222{secret}", f"0{secret}0", f"{secret}~",
                         f"note=code_{secret}", f"a-{secret}{secret}",
                         f"u=https%253A%252F%252Fa%253Fb%253D{secret}"):
                self.fhir(f"Observation?{text}", headers={"Referer": f"https://a.example/?{text}"})
                self.fhir(text, method="OPTIONS")
                self.at(f"/revoke/{text}", form={})
                self.at(f"/api/open-fhir/Patient/{text}/Observation")
                self.at(f"/nothing/{text}", headers={"X-Odd": f"a {text}, b", secret: "x"})
            self.at("/oauth/token", form={"client_id": secret, "grant_type": "x"})
            self.at("/oauth/token", basic=(secret, "x"), form={"grant_type": "x"})
            ask(f"{app.authorize_url(client_id=secret)}")
            self.at("/oauth/register", data={"a": [{secret: secret}, f"b {secret}"]})
        shown = [json.dumps([request.redacted() for request in self.portal.requests]), "\n".join(self.lines),
                 repr(self.portal.requests), self.at("/oauth/debug/requests").text]
        for secret in given:
            for number, text in enumerate(shown):
                secret = secret if secret in text else secret[-20:]  # nor most of it
                self.assertNotIn(secret, text, (number, text[max(0, text.find(secret) - 300):][:400]))

    def test_what_is_cut_cuts_through_no_secret(self) -> None:
        token = self.portal.issue_token()["access_token"]
        app = App(self.portal, "launch/patient " + " ".join(f"{i:04}.{token}" for i in range(150)))
        many, form = f"{token} " * 500, {"Content-Type": "application/x-www-form-urlencoded"}
        for path, how, words in (
                ("register", {"data": {"redirect_uris": many}}, "redirect_uris: expected an array"),
                ("register", {"data": {"redirect_uris": [App.redirect_uri], "jwks": {"keys": [
                    {"kty": "RSA", "kid": "x", "n": f"{token}~", "e": "AQAB"}]}}}, "without padding"),
                *(("token", {"form": {"grant_type": "x" * pad + f" {many}"}}, "refresh_token")
                  for pad in range(0, 36, 9))):
            got = self.at(f"/oauth/{path}", **cast(Any, how))
            self.assertIn(words, got.json["error_description"])
        for scope in (f'"{many}', "patient/*.rs", "launch/patient patient/*.rs"):
            ask(app.authorize_url(scope=scope))
        for kept in range(1, 36):
            body = f"note={'. ' * 40_000}"[:s4s.MAX_RECORDED_BODY - 3 - kept] + f"&x={token}y&z=1"
            self.at("/oauth/token", body=body.encode(), headers=form)
        texts = [*map(repr, self.portal.requests[-35:]), "\n".join(self.lines)]
        self.assertIn("note=. . ", texts[0])
        for text in texts:
            self.assertNotIn(token[:5], text, text[max(0, text.find(token[:5]) - 100):][:200])

    def test_secrets_of_any_characters_are_hidden_however_they_are_written(self) -> None:
        for secret in self.own:
            escaped = "".join(f"\\u{ord(char):04x}" for char in secret)
            part = secret[:-4] + "".join(f"%{byte:02X}" for byte in secret[-4:].encode())
            for text in (quote(secret, safe=""), quote_plus(secret), quote_plus(quote(secret, safe="")),
                         quote(secret, safe="", encoding="latin-1"), quote(part, safe="%"),
                         quote(f' {{"a": "{escaped}"}}'), "+" + quote(f'{{"a": "{escaped}"}}'),
                         quote(f'see {{"a": "{escaped}"}}')):
                self.at(f"/nothing/{text}?x={text}&y=my+{text}+ok", headers={"X-Odd": f"is {text}"})
            for text in (secret, f"is {secret} ok", part):
                sent = text.encode().decode("latin-1")
                self.post("/oauth/register", {"a": f"my {text}.", text: 1}, headers={"X-Odd": sent})
        self.assertIn("400 ", self.lines[-1])
        shown = repr(self.portal.requests), self.at("/oauth/debug/requests").text, "\n".join(self.lines)
        for text in shown:
            for _ in range(3):
                text = unquote_plus(re.sub(r"\\+u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), text))
            for piece in ("orse", "batter", "2+2", "ss/w", "p\xe4", "ab c"):
                self.assertNotIn(piece, text, text[max(0, text.find(piece) - 100):][:150])

    def test_what_came_as_a_secret_is_hidden_wherever_else_the_request_has_it(self) -> None:
        names, sesame = ("d", "p", "q", "dp", "dq", "qi", "k", "oth"), "open-sesame"
        jwt = "eyJhbGciOiJ.eyJpc3MiOi.c2lnbmF0dXJl"
        key = {"kty": "RSA", "n": "public", "e": "AQAB", **{name: f"{name}-{sesame}" for name in names}}
        pem = f"-----BEGIN PRIVATE KEY-----\n{sesame}\n-----END PRIVATE KEY-----"
        rows: list[tuple[str, dict[str, Any]]] = [(path, {"form": form}) for path, form in (
            ("/login", {"username": sesame, "password": sesame}),
            (f"/login?next=/{sesame}", {"username": "x", "password": sesame}),
            (f"/{sesame}", {"x": f'{{"password": "{sesame}"}}'}),
            ("/oauth/token", {"client_secret": sesame, "a": f"my {sesame}"}),
            ("/oauth/token", {"client_secret": sesame, sesame: "1"}),
            ("/oauth/token", {"client_id": sesame, "code": sesame}),
            ("/oauth/token", {"x": f' {{"p\\u0061ssword": "{sesame}"}}', "y": sesame}),
            ("/x", {"pw": sesame, "b": f"x%2525{sesame}"}),
            ("/x", {"pw": f"{sesame} & {sesame}, " * 9, "b": "my " + f"{sesame} & {sesame}, " * 9}),
            ("/x", {f"password{number}": f"{number}{sesame}" for number in range(300)}),
            ("/oauth/register", {"jwks": json.dumps(key), "pem": pem, "y": jwt}))]
        rows += [("/oauth/register", {"data": data}) for data in (
            {"redirect_uris": [], "jwks": {"keys": [key]}}, {"jwks": json.dumps([key]), "key": pem, "x": jwt},
            {"password": sesame}, {"code": [sesame]},
            {"password": f"{sesame} & " * 9, "x": ["my " + f"{sesame} & " * 9]})]
        rows += [(f"/x?x={sesame}", {"headers": {name: value, "X-Odd": sesame}}) for name, value in (
            ("Authorization", f"Bearer {sesame}"), ("Proxy-Authorization", f"Basic {sesame}"),
            ("X-Api-Key", sesame), ("X-Auth-Token", sesame), ("Cookie", f"a=1; theirs={sesame}; b=2"))]
        rows += [("/x", {"headers": {"X-Note": f'password="{sesame}" {jwt}', "X-Auth-Token": "sesame"}}),
                 (f"/api/fhir/Patient?PASSWORD={sesame}&u=%2F%3Fpass%2577ord%3D{sesame}", {})]
        for path, how in rows:
            with self.subTest(path=path, how=how):
                self.at(path, **how)
                self.assertNotRegex(repr(self.portal.requests[-1]), "sesame|c2ln")
        value = "b3BlbjpzZXNhbWU="
        self.fhir(f"Patient?x={quote(value)}", headers={"Authorization": f"Basic {value}", "X-Odd": value})
        self.assertNotIn(value.rstrip("="), repr(self.portal.requests[-1]))
        app = App(self.portal)
        ask(app.authorize_url(password=app.client_id))
        self.assertNotIn(app.client_id, repr(self.portal.requests[-1]))

    def dead_secrets(self, portal: s4s.Server, app: App, browser: Browser) -> list[str]:
        """A launch handle that was used, a code that expired, a session that ended: no table has them now."""
        launch = portal.launch(client_id=app.client_id).rpartition("=")[2]
        code = app.code(launch=launch, scope="launch patient/*.rs")
        portal.advance(100)
        app.code()
        browser.sign_in()
        [session] = browser.cookies.values()
        browser.open(portal.url + "/apps")
        browser.sign_out()
        self.assertEqual(portal.portal.state.rows("SELECT token FROM tokens WHERE token = ?", code), [])
        return [launch, code, session]

    def test_what_is_no_secret_stays_as_it_was_sent(self) -> None:
        app, uuid = App(self.portal), "0c9a1d3c-6b1f-4a53-9d57-5f1f9e5a7b11"
        query = f"code=http://loinc.org|8480-6&encounter={uuid}&request=MedicationRequest/1&_count=5"
        self.fhir(f"Patient/{uuid}?{query}", headers={"Referer": f"https://a.example/{uuid}"})
        ask(app.authorize_url(state=uuid))
        self.at("/oauth/token", form={"client_id": app.client_id, "scope": "a/b?c=d"})
        self.at("/oauth/register", data={"client_name": "x"})
        self.fhir("Observation", data={"code": {"text": "b=c & d"}, "p": 7})
        sent, shown = self.portal.requests, [request.redacted() for request in self.portal.requests]
        self.assertEqual(shown[0]["path"], f"/api/fhir/Patient/{uuid}")
        self.assertEqual(shown[0]["headers"], sent[0].headers)
        for was, told in zip(sent[:4], shown):
            self.assertEqual((told["query"], told["body"]), (was.query, was.body))
        self.assertEqual(json.loads(shown[4]["body"]), {"code": {"text": "b=c & d"}, "p": 7})

    def test_what_hides_secrets_is_quick_whatever_was_sent(self) -> None:
        form, started = {"Content-Type": "application/x-www-form-urlencoded"}, time.process_time()
        for text in ("eyJ" * 20_000, "a=" * 30_000, "%25" * 20_000, "-----BEGIN " * 5000, '"=' * 30_000,
                     "{" * 60_000, "a-" * 30_000, "0" * 60_000, "00000000-0000-0000-0000-" * 2500,
                     ("0" * 300 + ".") * 200, "&".join(f"password{i}=p{i}" for i in range(4000)),
                     "&".join(f"password{i}={i}" for i in range(20)) + "&x=" + "p0" * 30_000,
                     f"password={'p' * 30_000}0&x={'p' * 30_000}",
                     "&".join(f"password{i}={'p' * 1500}{i}" for i in range(19)) + "&x=" + "p" * 34_000):
            self.at("/oauth/token", body=text.encode(), headers=form)
        self.assertEqual(len(self.at("/oauth/debug/requests").json["requests"]), 14)
        self.assertLess(time.process_time() - started, 5)

    def run_everything(self, level: dict[str, bool]) -> None:
        """Use all that the portal has: a launch, a flow, vouchers used twice, tokens where they belong."""
        users = [{"username": "maria", "password": "open-sesame-7",
                  "patients": [{"patient_id": DANIEL, "is_user": True}, {"patient_id": AMY}]}]
        with s4s.Server(fixtures={"users": users}, **level) as portal:
            set_signing_key(portal)
            app, browser = App(portal, "openid fhirUser launch launch/patient patient/*.rs offline_access",
                               launch_uris=["https://app.example/launch"]), Browser(portal)
            public, service = App(portal, token_endpoint_auth_method="none"), KeyedApp(portal)
            launched = ask(portal.url + "/oauth/debug/launch", data={"client_id": app.client_id}).json
            browser.open(app.authorize_url(launch=launched["launch"]))
            for password in ("open-sesame-8", "open-sesame-7"):
                browser.sign_in("maria", password)
            browser.submit(DANIEL)
            code = browser.submit("authorize").location["code"]
            app.exchange(code, code_verifier="v" * 43)
            tokens = app.refresh(app.exchange(code).json["refresh_token"]).json
            code, assertion, token = public.code(), service.assertion(), tokens["access_token"]
            for _ in range(2):
                public.exchange(code)
                service.token(assertion)
            for path in ("/Patient", f"/Patient/{DANIEL}", f"/Patient/{JOSEPH}", "/Observation?_count=5"):
                ask(portal.fhir_url + path, token=token)
                ask(portal.fhir_url + path, token=token + "x")
            for path in ("/api/fhir/metadata", "/oauth/userinfo", "/api/me", "/health", "/oauth/jwks",
                         "/.well-known/openid-configuration", f"/oauth/debug/introspect?token={token}"):
                ask(portal.url + path, token=token)
            self.misplace(portal, app, tokens)
            browser.open(portal.url + "/apps")
            browser.open(portal.url + "/logout", "POST", [("form_token", "wrong-form-token")])
            ask(portal.url + "/oauth/debug/requests")
            self.written.append(repr(portal.requests))

    def misplace(self, portal: s4s.Server, app: App, tokens: Any) -> None:
        """Send secrets where they don't belong: in a path, in a query, in broken JSON, into a bug."""
        url, token, secret = portal.url, tokens["access_token"], {"client_secret": app.secret}
        maria = {"client_id": "test-suite", "username": "maria"}
        direct = ask(url + "/oauth/debug/token", data=maria).json
        ask(url + "/oauth/debug/token", data={**maria, "password": token})
        ask(url + "/oauth/userinfo", token=direct["refresh_token"])
        for path, value in (("introspect", token), ("revoke", direct["access_token"])):
            wrong = {"client_id": app.client_id, "client_secret": token}
            ask(f"{url}/oauth/{path}", form={"token": value}, basic=(app.client_id, app.secret))
            ask(f"{url}/oauth/{path}", form={"token": token})
            ask(f"{url}/oauth/{path}", form={"token": token, **wrong})
        ask(f"{url}/nothing/{token}/{direct['access_token'].upper()}?access_token={token}", token=token)
        for kind in ("text/plain", "", "multipart/form-data", "application/json"):
            ask(url + "/oauth/token", headers={"Content-Type": kind}, body=json.dumps(secret)[:-1].encode())
        ask(f"{url}/oauth/token?client_secret={app.secret}", form=secret)

        def broken(portal: s4s.Portal, request: s4s.Request) -> s4s.Response:
            raise RuntimeError(f"{request.form()} {request.headers}")
        routes = s4s._routes_by_path()[0]
        with mock.patch.dict(routes, {"/oauth/token": routes["/oauth/token"]._replace(endpoint=broken)}):
            app.refresh(tokens["refresh_token"])


# ######################################################################## 27 HTTP

class Sockets(RawTest):
    """Raw sockets, and where a message ends: no two servers in a row may read it another way (RFC 9112 6)."""
    def check(self, status: int, *requests: bytes, end: bool = False) -> None:
        """Each is answered once, with this status, and closed."""
        for data in requests:
            with self.subTest(data=data[:60]):
                self.assertEqual(self.statuses(data, end), [status])

    def chunked(self, body: bytes) -> bytes:
        return self.form("Transfer-Encoding: chunked", body=body)

    def test_malformed_lines_are_refused_and_the_connection_closed(self) -> None:
        host = f"Host: {self.portal.host}:{self.portal.port}\r\n".encode()
        lines = [b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ", b" GET / HTTP/1.1", b"GET /", b"get / HTTP/1.1",
                 b"GET /\0 HTTP/1.1", b"GET /\r HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1", b"GET /#x HTTP/1.1",
                 b"GET * HTTP/1.1", b"GET http:// HTTP/1.1", b"GET http://[/ HTTP/1.1", b"GET / HTTP/11.1",
                 b"GET http://me@localhost/ HTTP/1.1", b"GET //localhost\\@x/ HTTP/1.1\r\nX", b"nonsense",
                 b"GET relative HTTP/1.1", b"\r\n\r\nGET / HTTP/1.1", b"GET / HTTP/1.1\r\n" + host.strip()]
        lines += [b"GET / HTTP/1.1\r\n" + header for header in (
            b"X: a\0b", b"X: a\rb", b"X", b": x", b"X y: z", b"X : z", b"\tX: z", b" folded: b", b"X\xe9: z")]
        self.check(400, *(line + b"\r\n" + host + b"\r\n" for line in lines), b"GET / HTTP/1.1\r\n\r\n",
                   b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n")
        self.check(505, *(f"GET / HTTP/{version}\r\n\r\n".encode() for version in ("0.9", "2.0", "3.0")))
        self.check(421, b"GET / HTTP/1.1\r\nHost: rebound.example\r\nConnection: close\r\n\r\n")

    def test_a_line_that_ends_without_cr_is_400_however_it_is_cut_into_packets(self) -> None:
        host = f"Host: {self.portal.host}:{self.portal.port}\r\n".encode()
        for data in (b"GET /health HTTP/1.1\r\n" + host + b"X: y\n\n" + self.request("GET /apps"),
                     b"GET /health HTTP/1.1\r\n" + host + b"\n" + self.request("GET /apps"),
                     b"GET /health HTTP/1.1\r\n" + host + b"X: y\nZ: z\r\n\r\n",
                     b"GET /health HTTP/1.1\n" + host + b"\r\n", b"\n" + self.request("GET /health")):
            for cut in range(1, data.find(b"GET /apps") if b"/apps" in data else len(data), 7):
                with socket.create_connection((self.portal.host, self.portal.port), 10) as connection:
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    connection.sendall(data[:cut])
                    with contextlib.suppress(OSError):  # the first part may have been enough
                        connection.sendall(data[cut:])
                    self.assertEqual([answer.status for answer in self.answers(connection)], [400], data)

    def test_a_head_that_can_not_be_used_is_answered_in_the_endpoints_shape(self) -> None:
        twice, lines = ("Authorization: Bearer x", "Authorization: Bearer y"), log_of(self.portal)
        self.portal.settings.quiet = False
        self.addCleanup(setattr, self.portal.settings, "quiet", True)
        fhir, oauth, page = "OperationOutcome", "error_description", "<!doctype html>"
        for method, path, cors, shape in (("GET", "/api/fhir/Patient?x=1", True, fhir),
                ("PUT", "/api/open-fhir/Patient/1", True, fhir), ("POST", "/oauth/token", True, oauth),
                ("GET", "/oauth/debug/requests", False, oauth), ("GET", "/login", False, page),
                ("GET", "/apps", False, page), ("OPTIONS", "/api/me", True, fhir)):
            url = f"{method} {self.portal.url}{path}"
            for status, data in (
                    (400, self.request(url, *twice)), (400, self.request(f"{method} {path}", *twice)),
                    (400, self.request(url, "X : y")), (400, self.request(f"{method}  {path}")),
                    (400, f"{method} {path} HTTP/1.1\r\n\r\n".encode()),
                    (400, f"{method} {path} HTTP/1.1\r\nHost: a/b\r\n\r\n".encode()),
                    (400, f"{method} {path}\r\n".encode()), (505, f"{method} {path} HTTP/3.0\r\n".encode()),
                    (431, self.request(f"{method} {path}", "X: " + "x" * 70_000)),
                    (414, f"{method} {path}?{'x' * 70_000}".encode())):
                with self.subTest(method=method, path=path, data=data[:80]):
                    lines.clear()
                    [answer] = self.talk(data)
                    self.assertEqual(answer.status, status)
                    self.assertIn(shape, answer.text)
                    self.assertEqual(answer.headers.get("access-control-allow-origin"), "*" if cors else None)
                    self.assertEqual(answer.headers["x-content-type-options"], "nosniff")
                    line = rf"^{method} {path.partition('?')[0]} {status} [\d.]+ ms$"
                    self.assertRegex("".join(lines), line)
        self.assertEqual({recorded.status for recorded in self.portal.requests}, {400, 414, 431, 505})
        lines.clear()
        [answer] = self.talk(b"nonsense\r\n\r\n")
        self.assertEqual((answer.headers["x-content-type-options"], lines), ("nosniff", ["- - 400 0.0 ms"]))

    def test_a_body_over_the_limit_is_413_in_the_endpoints_shape_and_not_asked_for(self) -> None:
        line, too_long = "POST /api/fhir/Condition/_search", "Content-Length: 1048577"
        [answer] = self.talk(self.request(line, too_long, close=False))
        self.assertEqual((answer.status, answer.json["resourceType"]), (413, "OperationOutcome"))
        self.assertEqual(answer.headers["access-control-allow-origin"], "*")
        self.check(401, self.request("PATCH /api/fhir/Patient/x", too_long, close=False))
        self.check(413, self.request("PUT /api/fhir/Patient/x", too_long, close=False),
                   self.form(too_long), self.form("Expect: 100-continue", "Content-Length: 9999999"),
                   self.chunked(b"ffffffff\r\nabc"),
                   self.chunked((b"8000\r\n" + b"a" * 0x8000 + b"\r\n") * 33))

    def test_what_follows_a_body_is_the_next_request_also_when_nobody_wants_it(self) -> None:
        unwanted = self.request("POST /nothing", "Content-Length: 5", body=b"hello", close=False)
        data = (unwanted + self.request("GET /health", close=False) + self.request("GET /", close=False)
                + self.form("Content-Length: 0"))
        self.assertEqual(self.statuses(data), [404, 200, 200, 400])
        data = self.request("POST /oauth/token", "Content-Length: 3", body=b"abcdef\r\n\r\n", close=False)
        self.assertEqual(self.statuses(data), [415, 400])

    def test_a_body_whose_end_is_in_doubt_is_refused(self) -> None:
        twice = "Authorization: Basic eDp5", "Content-Type: a/b", "Content-Length: 0", "Expect: 100-continue"
        self.check(400, *(self.request("POST /oauth/token", line, line) for line in twice))
        self.check(400, self.form("Content-Length: 10", body=b"abc"), end=True)  # shorter
        self.check(400, self.form("Content-Length: 3", "Transfer-Encoding: chunked", body=b"0\r\n\r\n"))
        self.check(400, *(self.form(f"Content-Length: {length}", body=b"a") for length in (
            "", "-1", "+1", "1.0", "0x1", "1, 1", "1 1", "1" * 30, "a")))
        self.check(400, *map(self.chunked, (
            b"zz\r\n", b"-1\r\n", b"1\r\nab\r\n0\r\n\r\n", b"3\r\nab", b"\r\n", b"1\nab\n", b"0x1\r\na\r\n",
            b"123456789\r\n", b"1;" + b"x" * 2000 + b"\r\na\r\n0\r\n\r\n", b"0\r\nbad trailer\r\n\r\n", b"")),
                   end=True)
        self.check(501, *(self.form(f"Transfer-Encoding: {coding}", body=b"0\r\n\r\n") for coding in (
            "gzip", "gzip, chunked", "chunked, chunked", "identity", "xchunked")))

    def test_a_chunked_body_is_understood_and_its_trailers_forgotten(self) -> None:
        [answer] = self.talk(self.chunked(b"c;x=y\r\ngrant_type=n\r\n3\r\none\r\n0\r\n\r\n"))
        self.assertEqual(answer.json["error"], "unsupported_grant_type")
        [answer] = self.talk(self.chunked(b"3\r\na=b\r\n0\r\nAuthorization: Basic eDp5\r\n\r\n"))
        self.assertEqual(answer.json["error_description"], "grant_type is missing")
        data = self.request("POST /oauth/token", "Transfer-Encoding: chunked", body=b"0\r\n\r\n", close=False)
        self.assertEqual(self.statuses(data + self.request("GET /health")), [415, 200], "and what follows it")

    def test_expect_100_continue_is_answered_but_for_http_1_0_which_is_closed(self) -> None:
        data = self.request("POST /oauth/token", "Expect: 100-continue", "Content-Length: 4", body=b"a=bc")
        self.assertEqual(self.statuses(data), [100, 415])
        [answer] = self.talk(b"POST /oauth/token HTTP/1.0\r\nConnection: keep-alive\r\n"
                             b"Expect: 100-continue\r\nContent-Length: 1\r\n\r\na")
        self.assertEqual((answer.status, answer.headers["connection"]), (415, "close"))

    def test_targets_and_methods_of_any_kind_are_understood(self) -> None:
        url = self.portal.url
        [answer] = self.talk(self.request("BREW /oauth/token"))
        self.assertEqual((answer.status, answer.headers["allow"]), (405, "POST, OPTIONS"))
        self.check(204, self.request("OPTIONS *"))
        self.check(200, f"GET {url}/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(),
                   self.request(f"GET {url}?a=/b"))
        self.check(401, self.request(f"GET {url}/api/me?x=1"), self.request(f"GET HTTP{url[4:]}/api/me/"))
        self.check(421, self.request("GET http://evil.example/health"))

    def test_lines_that_came_before_bring_no_host_over_from_their_request(self) -> None:
        lines = "Host: localhost\r\nConnection: close"
        for target, version, headers, status in (
                ("/health", "1.0", "X-Same: 1", 200), ("/health", "1.1", "X-Same: 1", 400),
                ("http://evil.example/health", "1.1", lines, 421), ("/health", "1.1", lines, 200)):
            data = f"GET {target} HTTP/{version}\r\n{headers}\r\n\r\n".encode()
            self.assertEqual(self.statuses(data, end=True), [status], (target, version))


class SlowClients(RawTest):
    """A slow client holds one thread, for a bounded time, and nobody else."""
    def connect(self) -> Any:
        return self.during(socket.create_connection((self.portal.host, self.portal.port), 10))

    def test_a_slow_body_is_408_and_windows_says_so_too(self) -> None:
        self.limits(body_seconds=0.2, head_seconds=0.2)
        with mock.patch.object(sys, "platform", "win32"):
            self.assertEqual(self.statuses(b"GET / HT"), [408])
        for header, body in (("Content-Length: 10", b"abc"), ("Transfer-Encoding: chunked", b"5\r\nab")):
            self.assertEqual(self.statuses(self.form(header, body=body)), [408])

    def test_a_slow_header_is_408_bytes_that_drip_buy_no_more_time_and_nobody_else_waits(self) -> None:
        self.limits(head_seconds=0.3)
        connection = self.connect()
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        self.assertEqual(self.at("/health").status, 200)
        connection.settimeout(0.02)
        started, got = time.monotonic(), b""
        while not got and time.monotonic() - started < 5:
            connection.sendall(b"x")
            with contextlib.suppress(socket.timeout):
                got = connection.recv(1000)
        self.assertIn(b"408", got)

    def test_an_answer_may_take_longer_than_a_request(self) -> None:
        self.limits(head_seconds=0.1, body_seconds=0.1)
        self.portal.fail("token", delay=0.5, status=503)
        connection = http.client.HTTPConnection(self.portal.host, self.portal.port, timeout=10)
        self.during(contextlib.closing(connection)).connect()
        kept = connection.sock
        for path, status in (("/oauth/token", 503), ("/oauth/revoke", 401)):
            connection.request("POST", path, "token=x", {"Content-Type": "application/x-www-form-urlencoded"})
            answer = connection.getresponse()
            self.assertEqual((answer.status, connection.sock), (status, kept), answer.read())

    def test_a_test_suites_default_timeout_is_not_ours(self) -> None:
        self.addCleanup(socket.setdefaulttimeout, socket.getdefaulttimeout())
        socket.setdefaulttimeout(0.05)
        connection = self.connect()
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        connection.settimeout(0.2)
        with self.assertRaises(OSError):  # nothing comes yet
            connection.recv(1)
        connection.settimeout(10)
        connection.sendall(b"Host: localhost\r\n\r\n")
        self.assertIn(b" 200 ", connection.recv(100))

    def test_a_connection_made_while_the_server_stops_ends_at_once(self) -> None:
        one, other = map(self.during, socket.socketpair())
        timed, sockets = s4s.TimedSocket(one), s4s.OpenSockets()
        sockets.end()
        sockets.add(timed)
        self.assertRaises(ConnectionResetError, timed.readinto, bytearray(9))
        other.settimeout(10)
        self.assertEqual(other.recv(1), b"")

    def test_a_stop_ends_what_is_idle_at_once_on_every_system(self) -> None:
        for platform in (sys.platform, "win32"):
            with self.subTest(platform), mock.patch.object(sys, "platform", platform), \
                    s4s.Server() as portal, \
                    socket.create_connection((portal.host, portal.port), 10) as connection:
                connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                self.assertIn(b" 200 ", connection.recv(1000))
                started = time.monotonic()
                portal.stop()
                self.assertLess(time.monotonic() - started, 1)
                self.assertEqual(connection.recv(1), b"")

    def test_an_idle_connection_is_closed_without_words(self) -> None:
        self.limits(idle_seconds=0.2)
        self.assertEqual(self.statuses(b""), [])
        self.assertEqual(self.statuses(self.request("GET /health", close=False)), [200])

    def test_a_client_that_reads_nothing_is_given_up(self) -> None:
        self.limits(body_seconds=0.2)
        connection = self.connect()
        connection.settimeout(0.2)
        with contextlib.suppress(OSError):  # the server stops reading when its answers are not read
            connection.sendall(self.request("GET /api/open-fhir/Observation?_count=1000", close=False) * 2000)
        started = time.monotonic()
        with self.assertRaises(ConnectionError):  # whoever writes to a connection that is closed is told
            while time.monotonic() - started < 5:
                self.assertEqual(self.at("/health").status, 200)
                with contextlib.suppress(socket.timeout):
                    connection.send(b"x")

    def test_a_client_that_reads_little_by_little_is_given_up(self) -> None:
        done, (one, other) = threading.Event(), map(self.during, socket.socketpair())

        def read_slowly() -> None:
            while not done.wait(0.01):
                other.recv(10_000)
        reader = threading.Thread(target=read_slowly)
        reader.start()
        timed = s4s.TimedSocket(one)
        started = timed.deadline = time.monotonic() + 0.3
        try:
            self.assertRaises(TimeoutError, timed.send, b"x" * 100_000_000)
            self.assertLess(time.monotonic() - started, 1)
        finally:
            done.set()
            reader.join()

    def test_a_header_may_be_long_but_not_longer_than_64_kib(self) -> None:
        for lines, status in ((["X: " + "x" * 60_000], 200), (["X: " + "x" * 66_000], 431),
                              (["X: y"] * 190, 200), (["X: y"] * 201, 431), (["X: y"] * 12_000, 431)):
            self.assertEqual(self.statuses(self.request("GET /health", *lines)), [status])

    def test_no_more_threads_to_be_had_closes_the_connection_and_nothing_else(self) -> None:
        with s4s.Server() as portal:
            none_left = RuntimeError("can't start new thread")
            with mock.patch.object(threading.Thread, "start", side_effect=none_left), \
                    self.assertRaises((OSError, http.client.HTTPException)):
                ask(portal.url + "/health")
            self.assertEqual(ask(portal.url + "/health").status, 200)


class Https(Test):
    """--certfile and --keyfile."""
    @unittest.skipUnless(shutil.which("openssl"), "needs openssl to make a certificate")
    def test_https_is_served_with_secure_cookies_and_a_stuck_handshake_holds_nobody(self) -> None:
        folder = self.during(tempfile.TemporaryDirectory())
        cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
        make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        subprocess.run([*make, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert],
                       check=True, capture_output=True)
        self.during(mock.patch.object(s4s.Listener, "head_seconds", 0.5))
        portal = self.during(s4s.Server(certfile=cert, keyfile=key))
        silent = self.during(socket.create_connection((portal.host, portal.port), 10))
        self.assertTrue(portal.url.startswith("https://"))
        context = ssl.create_default_context(cafile=cert)
        with contextlib.closing(http.client.HTTPSConnection(
                "localhost", portal.port, timeout=30, context=context)) as connection:
            connection.request("GET", "/login")
            got = connection.getresponse()
            self.assertIn("; Secure", got.headers["set-cookie"])
            got.read()
            connection.request("GET", "/api/fhir/.well-known/smart-configuration")
            found = json.load(connection.getresponse())
        self.assertEqual(found["token_endpoint"], f"https://localhost:{portal.port}/oauth/token")
        slow = self.during(socket.create_connection((portal.host, portal.port), 10))
        secure = self.during(context.wrap_socket(slow, server_hostname="localhost"))
        secure.sendall(b"GET / HT")
        self.assertIn(b" 408 ", secure.recv(100))
        goodbye = silent.makefile("rb").read()
        self.assertLess(len(goodbye), 100, "up to the end: at most TLS's own goodbye")


# ######################################################################## 28 command line

class CommandLine(unittest.TestCase):
    """python s4s_proxy.py"""
    def run_main(self, *argv: str, out: io.StringIO | None = None) -> tuple[int, str, str]:
        """Run main in this thread; give exit status, standard output, standard error."""
        out, err = out or io.StringIO(), io.StringIO()
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
        status, out, err = self.run_main("--port", "0", "--no-pkce", out=Out())
        self.assertEqual((status, heard[0].json["status"]), (0, "ok"))
        self.assertRegex(out, r"^http://127\.0\.0\.1:\d+\n$")
        for needle in ("daniel-adams", "demo-password", "open-fhir", "FOR TESTING ONLY", "GET /health 200",
                       "(--no-pkce)"):
            self.assertIn(needle, err)

    def test_as_a_process_of_its_own(self) -> None:
        with started() as (process, url):
            self.assertEqual(ask(url + "/health").status, 200)
            process.terminate()
            self.assertEqual(process.wait(10), 0 if os.name == "posix" else 1)

    def test_a_bad_option_is_exit_status_2_and_version_is_none(self) -> None:
        self.assertEqual(self.run_main("--version"), (0, s4s.__version__ + "\n", ""))
        for line in ("--nonsense", "--base-url nonsense", "--base-url http://[", "--base-url http://a/?b",
                     "--keyfile x", "--quiet --verbose", "--strict --no-pkce", "--token-lifetime 0",
                     "--fhir-version r9", "--data x --fhir-server http://localhost:1/"):
            with self.subTest(line), mock.patch.object(s4s.Server, "start", side_effect=AssertionError):
                status, out, err = self.run_main(*line.split())
                self.assertEqual((status, out), (2, ""))
                self.assertIn(line.split()[0], err)

    def test_the_originals_environment_variables_count_where_no_option_is_given(self) -> None:
        chosen = vars(s4s.build_parser().parse_args(["--open-fhir"]))
        with mock.patch.dict(os.environ, {"BASE_URL": "https://a.example", "ENABLE_UNSECURE_FHIR": "False"}):
            self.assertEqual(s4s.settings_from_environment(chosen), {"base_url": "https://a.example"})
            self.assertEqual(s4s.settings_from_environment({})["open_fhir"], False)
        for variable, text in (("BASE_URL", "nonsense"), ("ENABLE_UNSECURE_FHIR", "perhaps"),
                               ("API_SERVER", "http://fhir.example")):  # beside --data
            with self.subTest(variable=variable), mock.patch.dict(os.environ, {variable: text}), \
                    self.assertRaisesRegex(s4s.StartError, f"{variable}={text}: "):
                s4s.settings_from_environment({"data": ["x"]})

    def test_a_start_that_fails_is_one_line_and_exit_status_1(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            for line in (f"--port {taken.getsockname()[1]}", "--client nonsense", "--db /nonexistent/x.db",
                         "--certfile /nonexistent", "--client a=javascript:x", "--port 99999"):
                with self.subTest(line):
                    status, out, err = self.run_main("--port", "0", *line.split())
                    self.assertEqual((status, out, err.count("\n")), (1, "", 1))
                    self.assertIn(line.split()[1].partition("=")[0], err)

    def test_the_command_line_asks_a_fhir_server_what_it_is_and_nobody_waits_for_the_answer(self) -> None:
        goes_on, behind, no_base = threading.Event(), FhirServer(), "has no CapabilityStatement"
        self.addCleanup(behind.stop)
        self.addCleanup(goes_on.set)
        rows: Any = ((no_base, {}, 404), (no_base, b"<html>"), (no_base, {"resourceType": "Patient"}),
                     ("--fhir-header can give", {}, 401))
        for needle, *answer in rows:
            with self.subTest(answer=answer), s4s.Server(fhir_server=behind.url) as portal:
                behind.script, lines = {"metadata": json_answer(*answer)}, log_of(portal)
                ask(portal.url + "/health")
                self.assertEqual(lines, [], "Server() asks nothing")
                s4s.look_behind(portal.portal)
                self.assertEqual((len(lines), needle in lines[0]), (1, True), lines)

        def asked(_: str) -> Any:
            signal.raise_signal(signal.SIGINT)
            return goes_on.wait(20) and b""
        begun, at_last = time.monotonic(), threading.Timer(10, signal.raise_signal, (signal.SIGINT,))
        self.addCleanup(at_last.cancel)
        at_last.start()
        with mock.patch.object(behind, "answer", asked):
            status, out, _ = self.run_main("--port", "0", "--fhir-server", behind.url)
        self.assertEqual((status, out.count("\n")), (0, 1))
        self.assertLess(time.monotonic() - begun, 10, "it was waited for")

    def test_no_name_in_data_writes_a_line_or_steers_the_terminal(self) -> None:
        odd, log = "X\nlisten on everything\x1b]0;\x07\u202e", io.StringIO()
        with contextlib.redirect_stderr(log), s4s.Server(data=made(odd)) as portal:
            s4s.write_log(*s4s.banner(portal, []))
            portal.portal.log(f"warning: {odd}")
        for settings in ({"data": odd}, {"fixtures": odd}, {"fhir_version": odd}):
            with self.subTest(settings=settings), self.assertRaises(s4s.StartError) as caught:
                s4s.Server(**settings).start()
            log.write(f"{caught.exception}\n")
        self.assertEqual(len(re.findall(r"X\\x0alisten on everything\\x1b.*\\x07\\x202e", log.getvalue())), 5)
        for line in log.getvalue().splitlines():
            self.assertTrue(line.isprintable() and not line.startswith("listen"), line)

    def test_a_signal_ends_a_start_that_takes_long(self) -> None:
        for kind in (signal.SIGINT, signal.SIGTERM):
            with mock.patch.object(s4s, "sources", lambda _: signal.raise_signal(kind)):  # noqa: B023
                self.assertEqual(self.run_main("--port", "0", "--data", "x"), (0, "", ""))

    def test_a_log_that_nobody_reads_any_more_stops_nothing(self) -> None:
        closed = io.StringIO()
        closed.close()
        with s4s.Server(quiet=False) as portal:
            for stderr in (None, closed):
                with mock.patch.object(sys, "stderr", stderr):
                    self.assertEqual(ask(portal.url + "/health").status, 200)


# ######################################################################## the head of the book

def named(path: str) -> Any:
    """The function that the head names, such as Access.may_see, without what decorates it."""
    found: Any = s4s
    for name in path.split("."):
        found = getattr(found, name)
    return inspect.unwrap(found)


@contextlib.contextmanager
def calls(*paths: str) -> Iterator[list[str]]:
    """Which functions of the module run in threads that start meanwhile, in the order in which they begin."""
    names, seen = {named(path).__code__: path for path in paths}, []  # type: dict[Any, str], list[str]

    def notice(frame: Any, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code in names:
            seen.append(names[frame.f_code])
    threading.setprofile(notice)
    try:
        yield seen
    finally:
        threading.setprofile(None)


# One of the nine messages of the story, as the head tells it.
Message = collections.namedtuple("Message", "function method target token body status answer")


class Story:
    """Plays messages as they stand: what stands in <angle brackets> is put in where it is known, and learnt
    where the server's answer shows it first."""
    def __init__(self, portal: s4s.Server, **known: str):
        self.browser, self.known = Browser(portal), {"portal": portal.url, **known}

    def filled(self, text: str) -> str:
        return re.sub("<([^<>]+)>", lambda word: self.known.get(word[1], word[0]), text)

    def learn(self, expected: str, came: str) -> bool:
        """Whether a text came as expected; new words are learnt from it."""
        shape = self.filled(expected)
        match = re.fullmatch(re.sub("<[^<>]+>", "(.+?)", re.escape(shape)), came)
        self.known.update(zip(re.findall("<([^<>]+)>", shape), match.groups() if match else ()))
        return bool(match)

    def play(self, message: Message) -> Answer:
        """Send a message, as the browser where it is the browser's."""
        kind = "json" if message.body[:1] == "{" else "x-www-form-urlencoded"
        answer = self.browser.ask(
            self.filled("<portal>" + message.target), method=message.method, token=self.filled(message.token),
            headers={"Content-Type": f"application/{kind}"}, body=self.filled(message.body).encode() or None)
        location = answer.headers.get("location", "")
        if location.startswith(self.known["portal"]):  # the page on which the form stands
            self.known["form"] = dict(Form(self.browser.open(location).text).fields)["form_token"]
        return answer


def story() -> list[Message]:
    """The nine messages, read from the head."""
    text, messages = s4s.__doc__.partition("The story in nine messages")[2].partition("A grant's life")[0], []
    for function, sent, status, answer in re.findall(
            r"(?ms)^  \d  .+?  +(\S+)\n +> (.+?)\n +< (\d+) (.+?)$(?=\n  \d|\n\n)", text):
        first, *lines = [line.strip() for line in sent.split("\n")]
        first, _, token = first.partition("Authorization: Bearer ")
        method, target = first.split()
        while lines and lines[0].startswith("&"):
            target += lines.pop(0)
        told = [line for line in answer.split("\n") if not line.lstrip().startswith("(")]  # those explain
        body, answer = "".join(lines), " ".join(" ".join(told).split())
        messages.append(Message(function, method, target, token, body, int(status), answer))
    return messages


class TheHead(unittest.TestCase):
    """What the head of the book says is so."""
    source = (HERE / "s4s_proxy.py").read_text(encoding="utf-8")
    below = "= Part Two: the records\n"  # what stands behind it is used by Part One only where it says so

    def test_the_story_is_what_a_running_server_says(self) -> None:
        messages = story()
        self.assertEqual(len(messages), 9)
        verifier, day = secrets.token_urlsafe(48), s4s.day_of(time.time() + 86400)
        with calls(*{message.function for message in messages}) as seen, s4s.Server() as portal:
            told = Story(portal, state=secrets.token_urlsafe(9), verifier=verifier, day=day,
                         challenge=s4s.s256_challenge(verifier))
            for number, message in enumerate(messages, 1):
                with self.subTest(number):
                    seen.clear()
                    answer = told.play(message)
                    self.assertEqual(answer.status, message.status, answer)
                    self.assertIn(message.function, seen)
                    if message.status == 303:
                        self.assertTrue(told.learn(message.answer, answer.headers["location"]), answer)
                        continue
                    expected = re.sub(r", \.\.\.|, \"\w+\": \[\.\.\.\]", "", message.answer)
                    for name, value in json.loads(expected).items():
                        came = answer.json[name]
                        self.assertTrue(came == value or told.learn(str(value), str(came)), (name, came))
        tokens = {told.known[name] for name in ("access", "refresh", "second access", "second refresh")}
        self.assertEqual(len(tokens), 4)

    def test_a_request_runs_through_the_functions_in_the_order_told_and_downwards(self) -> None:
        text = s4s.__doc__.partition("Follow one request")[2].partition("Legend")[0]
        stops = re.findall(r"^ +\d+  (\S+)", text, re.MULTILINE)
        with calls(*stops) as seen, s4s.Server() as portal:
            app, browser = App(portal), Browser(portal)
            browser.open(portal.url + "/login")
            browser.sign_in()
            browser.open(app.authorize_url())
            back = browser.submit(DANIEL) and browser.submit("authorize")
            token = app.exchange(back.location["code"]).json["access_token"]
            ask(f"{portal.fhir_url}/Patient/{DANIEL}", token=token)
        self.assertEqual(list(dict.fromkeys(seen)), stops)
        places = [named(stop).__code__.co_firstlineno for stop in stops]
        self.assertEqual(places, sorted(places))

    def test_the_map_is_that_of_the_file(self) -> None:
        banners = re.findall(r"^# #{72} (\d+) (.+)$", self.source, re.MULTILINE)
        self.assertEqual([int(number) for number, _ in banners], list(range(1, len(banners) + 1)))
        mapped = s4s.__doc__.partition("Map, with reading times")[2].partition("Follow one request")[0]
        self.assertEqual(re.findall(r"^ +(\d+)  (\S+(?: \S+)*)", mapped, re.MULTILINE), banners)

    def test_the_protocol_stands_where_it_is_promised(self) -> None:
        places = {line.split(" = ")[0]: number for number, line in enumerate(self.source.split("\n"), 1)}
        self.assertLess(places["REDIRECT_CHECKS"], 1800, "the list of checks")
        self.assertLess(places[f"# {'#' * 72} 12 discovery"], 2500, "after the FHIR endpoint and its judge")

    def test_part_one_uses_of_what_stands_below_only_what_it_says(self) -> None:
        def names(node: ast.AST, context: type[ast.expr_context]) -> set[str]:
            return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)
                    and isinstance(inner.ctx, context) and id(inner) not in hints}
        module = ast.parse(self.source)
        hints = {id(inner) for node in ast.walk(module) for name in ("annotation", "returns")
                 for inner in ast.walk(getattr(node, name, None) or ast.Pass())}
        end = self.source[:self.source.index(self.below)].count("\n")
        named_below: set[str] = set()
        used: set[str] = set()
        for node in module.body:
            if node.lineno <= end:
                arguments = {inner.arg for inner in ast.walk(node) if isinstance(inner, ast.arg)}
                used |= names(node, ast.Load) - names(node, ast.Store) - arguments
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                named_below.add(node.name)
            else:
                named_below |= names(node, ast.Store)
        told = self.source.partition("= Part One: the protocol\n")[2].partition("\n#\n")[0]
        listed = set(re.findall(r"\b[\w.]+\b", re.sub(r"\([^)]*\)", "", told.partition("below:")[2])))
        self.assertEqual(used & named_below, listed & named_below)
        self.assertEqual(listed - named_below - {"and", "signing", "pages", "records"}, set())

    def test_the_examples_in_docstrings_hold(self) -> None:
        results = doctest.testmod(s4s)
        self.assertEqual(results.failed, 0)
        self.assertGreater(results.attempted, 3)

    def test_no_function_is_longer_than_forty_lines(self) -> None:
        for node in itertools.chain(*map(ast.walk, Repository.sources)):
            if isinstance(node, ast.FunctionDef):
                self.assertLessEqual((node.end_lineno or 0) - node.lineno + 1, 40, node.name)


# ######################################################################## promises about the repository

def output_of(*command: str, given: str = "", folder: Path | str = HERE) -> str:
    """Run a command to its end, in a folder; give what it wrote."""
    done = subprocess.run(command, input=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=folder, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


class Repository(Test):
    """What the repository itself promises."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    sources = tuple(ast.parse((HERE / name).read_text(encoding="utf-8"))
                    for name in ("s4s_proxy.py", "test_s4s_proxy.py"))

    def example(self, marker: str) -> str:
        """The README's code blocks below a comment such as `run: tour`, as one text."""
        blocks = re.findall(rf"<!-- {marker} -->\n```\w*\n(.*?)```", self.readme, re.DOTALL)
        assert blocks, marker
        return "".join(blocks)

    def run_example(self, name: str, *command: str, portal: s4s.Server | None = None) -> str:
        """Run the example marked `run: name` as it stands, but for the server's address; give its output."""
        if not shutil.which(command[0]):
            self.skipTest(f"{command[0]} is not installed")
        text, url = self.example(f"run: {name}"), "http://localhost:8000"
        if command[0] in ("bash", "sh", "zsh"):
            text = f'python() {{ "{sys.executable}" "$@"; }}\n{text}'  # whatever it is called here
        return output_of(*command, given=text.replace(url, portal.url if portal else url))

    @unittest.skipUnless(os.name == "posix" and shutil.which("curl"), "needs a shell and curl")
    def test_the_readmes_shell_examples_lead_through_the_flow_in_any_shell(self) -> None:
        with s4s.Server() as portal:
            self.assertRegex(self.run_example("quick", "bash", "-e", portal=portal), '"family": ?"Adams"')
            self.assertEqual({request.status for request in portal.requests}, {200})
        with s4s.Server() as portal:
            self.assertIn("HTTP/1.1 201", self.run_example("write", "bash", "-e", portal=portal))
        for shell in filter(shutil.which, ("bash", "sh", "zsh")):
            with self.subTest(shell), s4s.Server() as portal:
                shown = self.run_example("tour", shell, "-e", portal=portal)
                shows = self.example("shows").replace("http://localhost:8000", portal.url)
                pattern = ".*?".join(re.escape(part.strip()) for part in shows.split("…"))
                self.assertTrue(re.fullmatch(pattern, shown.strip(), re.DOTALL), shown)
                seen = [(request.path.rpartition("/")[2], request.status) for request in portal.requests]
                self.assertEqual(seen, [("smart-configuration", 200), ("register", 201), ("token", 200),
                    (DANIEL, 200), ("Observation", 200), (AMY, 403), ("smart-Condition-120", 404),
                    ("introspect", 200), ("token", 200), ("revoke", 200), (DANIEL, 401)])
        # Typed into a shell, # is a comment and ! none of the history in some of them only.
        self.assertNotRegex(self.example("run: (?:quick|tour)"), "#|!")

    def test_the_readmes_fixtures_start_a_server(self) -> None:
        with s4s.Server(fixtures=json.loads(self.example("fixtures.json"))) as portal:
            token = portal.issue_token(username="maria", client_id="growth-chart")
            self.assertEqual(token["patient"], JOSEPH)

    def test_the_readmes_calls_make_the_errors_that_the_public_launcher_simulates(self) -> None:
        rows = re.findall(r"\| (.*) \* \| (`.*`) \| (.*) \|", self.readme)
        self.assertEqual(len(rows), 7)
        with s4s.Server() as portal:
            for name, calls, shown in rows:
                for call in re.findall("`(.*?)`", calls):
                    app = App(portal)
                    issue = functools.partial(portal.issue_token, client_id=app.client_id)
                    before = issue()
                    given = eval(call, {"fail": portal.fail, "advance": portal.advance, "issue_token": issue})
                    tokens = given if "issue_token" in call else before
                    if shown.startswith("FHIR"):
                        got = ask(f"{portal.fhir_url}/Patient/{DANIEL}", token=tokens["access_token"])
                    elif shown.startswith("token endpoint"):
                        got = app.refresh(tokens["refresh_token"])
                    else:
                        got = ask(app.authorize_url())
                    self.assertIn(str(got.status), shown.replace("redirect with", "303"), name)
                    for word in re.findall("`(.*?)`", shown):
                        self.assertIn(word, f"{got.headers} {got.text}", name)
                    portal.reset()

    def test_the_readmes_programs_run_and_its_test_does_the_five_jobs_in_29_lines(self) -> None:
        for name, command, shown in (("unittest", sys.executable, "Ran 2 tests"),
                                     ("backend", sys.executable, re.escape(str([AMY, JOSEPH, DANIEL]))),
                                     ("node", "node", r"^200\s+Adams\s+401\s*$")):
            with self.subTest(name), s4s.Server() as portal, \
                    mock.patch.dict(os.environ, {"PYTHON": sys.executable}):
                self.assertRegex(self.run_example(name, command, "-", portal=portal), shown)
        code = self.example("run: unittest").partition("class ")[2].partition("\nif __name__")[0]
        self.assertLessEqual(len(list(filter(None, code.splitlines()))), 29)

    def test_the_readme_shows_every_option_and_endpoint_and_names_functions_that_are_there(self) -> None:
        rows = [f"| {' '.join(route.methods)} | `{route.path.replace('{}', '…')}` | {route.spec} | "
                f"{s4s.what_it_does(route)} |\n" for route in s4s.ROUTES]
        for word in [flag for action in s4s.build_parser()._actions for flag in action.option_strings] + rows:
            self.assertTrue(word in self.readme, word)
        for name in re.findall(r"; `(\w+)\(\)`", self.readme):
            self.assertTrue(callable(getattr(s4s, name)), name)

    def test_every_route_class_and_function_says_what_it_does(self) -> None:
        for route in s4s.ROUTES:
            self.assertTrue(route.spec and route.endpoint.__doc__, route)
        body = self.sources[0].body
        overriding = ("readable", "readinto")  # the standard library says what these do
        inner = [node for kind in body if isinstance(kind, ast.ClassDef) for node in kind.body]
        for node in [*body, *inner]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                self.assertTrue(ast.get_docstring(node) or node.name in overriding, node.name)

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_only_the_standard_library_is_imported(self) -> None:
        for node in itertools.chain(*map(ast.walk, self.sources)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            roots = {module.partition(".")[0] for module in modules}
            self.assertLessEqual(roots, {*sys.stdlib_module_names, "s4s_proxy"})

    def test_the_module_works_under_another_name_inside_a_package_and_from_a_zip_file(self) -> None:
        folder = self.during(tempfile.TemporaryDirectory())
        package, path = Path(folder, "vendor_"), os.path.join(folder, "vendored.zip")
        package.mkdir()
        (package / "__init__.py").write_text("")
        shutil.copy(HERE / "s4s_proxy.py", package / "smart_portal.py")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(HERE / "s4s_proxy.py", "zipped_portal.py")
        for start in ("from vendor_ import smart_portal as s4s",
                      f"import sys; sys.path.insert(0, {path!r}); import zipped_portal as s4s"):
            with self.subTest(start):
                program = f"{start}\nwith s4s.Server() as portal: print(portal.issue_token()['patient'])"
                shown = output_of(sys.executable, "-W", "error", "-c", program, folder=folder)
                self.assertEqual(shown.strip(), DANIEL)


# ######################################################################## the benchmark

def serve_bare(body: bytes) -> None:
    """The floor: a handler of http.server that answers one body, HTTP/1.1, one buffered write. It runs until
    the process ends; its address is printed."""
    class Bare(FhirHandler):
        setup = http.server.BaseHTTPRequestHandler.setup

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
    http.server.ThreadingHTTPServer.request_queue_size = 1024
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bare) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


@contextlib.contextmanager
def bare_process(body: bytes) -> Iterator[str]:
    """A bare handler in a process of its own, as a FHIR server would be; gives its address."""
    with subprocess.Popen([sys.executable, __file__, "--bare"], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        process.stdin.write(body)
        process.stdin.close()
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.terminate()


def hammer(url: str, connections: int, seconds: float, request: bytes) -> tuple[float, float]:
    """Send a request over all of some kept-alive connections, again and again: requests and MB a second."""
    address = urlsplit(url).hostname or "", urlsplit(url).port or 80
    sockets = [socket.create_connection(address) for _ in range(connections)]
    files = [connection.makefile("rb") for connection in sockets]
    count, size, begun = 0, 0, time.perf_counter()
    while time.perf_counter() < begun + seconds:
        for connection in sockets:
            connection.sendall(request)
        for file in files:
            status, length = file.readline(), 0
            assert status.startswith(b"HTTP/1.1 200"), status
            for line in iter(file.readline, b"\r\n"):
                if line[:15].lower() == b"content-length:":
                    length = int(line[15:])
            size += len(file.read(length))
            count += 1
    taken = time.perf_counter() - begun
    return count / taken, size / taken / 1e6


def rate(url: str, request: bytes, connections: int = 8) -> list[float]:
    """The median of three rounds of `hammer`, run by another process."""
    command = [sys.executable, __file__, "--hammer", url, str(connections), "1"]
    rounds = [subprocess.run(command, input=request, capture_output=True, check=True) for _ in range(3)]
    return sorted([float(word) for word in done.stdout.split()] for done in rounds)[1]


def raw(method: str, path: str, token: str = "", body: str = "",
        kind: str = "application/x-www-form-urlencoded") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Accept: application/json", "User-Agent: it"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    if body:
        lines += [f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


def timed(action: Callable[[], object], rounds: int = 9) -> float:
    """The median time of an action, in milliseconds."""
    times = [time.perf_counter()]
    for _ in range(rounds):
        action()
        times.append(time.perf_counter())
    return sorted(1000 * (end - begin) for begin, end in zip(times, times[1:]))[rounds // 2]


def first_answer(cache: str, *how: str) -> tuple[float, float]:
    """Start the program, ask once: milliseconds, and MiB of memory (0 where the system doesn't tell). Python
    keeps what it compiled, of modules, in the folder `cache`."""
    variables, begun, memory = {"PYTHONPYCACHEPREFIX": cache, "PYTHONDONTWRITEBYTECODE": ""}, time.time(), 0.0
    with mock.patch.dict(os.environ, variables), started(program=how) as (process, url):
        ask(url + "/health")
        taken = (time.time() - begun) * 1000
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process.pid}/status").read_text()
            memory = int(text.partition("VmRSS:")[2].split()[0]) / 1024
    return taken, memory


def add_tokens(portal: s4s.Server, count: int) -> None:
    given = portal.issue_token()["access_token"]
    with portal.portal.state.transaction() as database:
        names = [row[1] for row in database.execute("PRAGMA table_info(tokens)")]
        columns = ", ".join("?" if name == "token" else name for name in names)
        database.executemany(f"INSERT INTO tokens SELECT {columns} FROM tokens WHERE token = '{given}'",
                             ((secrets.token_hex(16),) for _ in range(count)))


def show(what: str, figure: str, ratio: str = "") -> None:
    print(f"| {what} | {figure} | {ratio} |", flush=True)


def benchmark() -> None:
    """Print how fast all is, each figure beside a bare http.server handler or process of the same run."""
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, {sys.platform}\n")
    show("what", "figure", "beside the bare one")
    show("---", "---:", "---:")
    benchmark_starts()
    benchmark_requests()
    benchmark_forwarding()
    benchmark_loading()


def benchmark_starts() -> None:
    program = "import http.server, sqlite3, json"
    bare_start = timed(lambda: subprocess.run([sys.executable, "-c", program], check=True))
    with tempfile.TemporaryDirectory() as cache:
        for how in (["s4s_proxy.py"], ["-m", "s4s_proxy"]):
            starts = [first_answer(cache, *how) for _ in range(10)][1:]
            start, command = sorted(taken for taken, _ in starts)[4], f"`python {' '.join(how)}`"
            show(f"{command}, start to first answer", f"{start:.0f} ms",
                 f"{start / bare_start:.2f} x `python -c \"{program}\"`")
            show(f"{command}, memory then", f"{max(memory for _, memory in starts):.1f} MiB")

    def whole() -> None:
        with s4s.Server() as portal:
            ask(portal.url + "/health")
    show("`Server()` start, one request, stop", f"{timed(whole, 31):.1f} ms")


def benchmark_requests() -> None:
    with s4s.Server() as portal, bare_process(b'{"x": "' + b"x" * 491 + b'"}') as bare:
        ask(f"{portal.open_fhir_url}/Patient")
        show("`reset()`", f"{timed(portal.reset, 31):.2f} ms")
        token, app = portal.issue_token(scope="patient/*.rs")["access_token"], App(portal)
        look = raw("POST", "/oauth/introspect", token, f"token={token}")
        read = raw("GET", f"/api/fhir/Patient/{DANIEL}", token)
        floors = {connections: rate(bare, raw("GET", "/"), connections)[0] for connections in (1, 8, 32)}

        def compare(what: str, request: bytes, connections: int = 8, size: bool = False) -> None:
            speed, megabytes = rate(portal.url, request, connections)
            more = f", {megabytes:.0f} MB/s" if size else ""
            show(what, f"{speed:,.0f} /s{more}", f"{speed / floors[connections]:.2f} x")
        for connections in floors:
            compare(f"introspections, {connections} connections", look, connections)
            compare(f"token reads of a Patient, {connections} connections", read, connections)
        for count in (10, 1000):
            path = f"/api/fhir/Observation?patient={DANIEL}&_count={count}"
            compare(f"searches of {count} entries", raw("GET", path, token), size=True)
        writer = portal.issue_token(scope="patient/*.u")["access_token"]
        for connections in (1, 8):
            write = json.dumps(observation("smart-Observation-829-8867-4", note=[{"text": "x" * 300}]))
            compare(f"writes (updates of an Observation), {connections} connections", raw(
                "PUT", "/api/fhir/Observation/smart-Observation-829-8867-4", writer, write,
                "application/fhir+json"), connections)
        flows = 1000 / timed(lambda: flow(app), 201)
        show("code flows: `approve` and the token endpoint", f"{flows:,.0f} /s")
        for count in (1_000, 100_000):
            add_tokens(portal, count)
            compare(f"introspections with {count:,} live tokens", look)


def benchmark_forwarding() -> None:
    """The same in front of a FHIR server, which is a bare handler."""
    for what, parts, padding in (("reads (2 kB)", 0, 1850), ("searches (1 MB, 100 entries)", 100, 9800)):
        text = ("Taken twice, 5 minutes apart; see above. " * 250)[:padding]
        record = observation("mine", note=[{"text": text}])
        bundle = {"resourceType": "Bundle", "type": "searchset", "entry": [{"resource": record}] * parts}
        path = "Observation" if parts else "Observation/mine"
        with bare_process(json.dumps(bundle if parts else record).encode()) as bare, \
                s4s.Server(fhir_server=bare) as portal:
            portal.portal.log = lambda *lines: None  # not the warning that a bare handler has no metadata
            token = portal.issue_token(scope="patient/*.rs")["access_token"]
            for connections in (1, 8):
                floor = rate(bare, raw("GET", f"/{path}"), connections)[0]
                speed, megabytes = rate(portal.url, raw("GET", f"/api/fhir/{path}", token), connections)
                show(f"forwarded {what}, {connections} connections", f"{speed:,.0f} /s, {megabytes:.0f} MB/s",
                     f"{speed / floor:.2f} x")


def benchmark_loading() -> None:
    """Loading a folder of Bundles with 100,000 resources."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        size = 0
        for number in range(100):
            people = [f"p{number}-{place}" for place in range(10)]
            text = json.dumps(bundle_of(*(made(f"Patient/{key}", name=[{"text": key}]) for key in people), *(
                observation(f"{key}-{place}", key, effectiveDateTime="2020-02-02", note=[{"text": "x" * 300}],
                            category=[{"coding": [{"code": "laboratory"}]}],
                            valueQuantity={"value": place, "unit": "mg/dL"})
                for key in people for place in range(99))))
            size += Path(folder, f"{number}.json").write_text(text)
        begun = time.perf_counter()
        with s4s.Server(data=folder):
            taken = time.perf_counter() - begun
    show("loading resources of 700 bytes, in memory", f"{size / taken / 1e6:.0f} MB/s")


def flow(app: App) -> None:
    """A code approved and exchanged, without the cost of a client."""
    portal = app.portal
    form = {"grant_type": "authorization_code", "code": app.code(), "redirect_uri": app.redirect_uri,
            "code_verifier": app.verifier}
    credentials = base64.b64encode(f"{app.client_id}:{app.secret}".encode()).decode()
    request = s4s.Request("POST", "/oauth/token", {
        "host": f"{portal.host}:{portal.port}", "authorization": f"Basic {credentials}",
        "content-type": "application/x-www-form-urlencoded"}, urlencode(form).encode())
    assert s4s.dispatch(portal.portal, request).status == 200


if __name__ == "__main__":
    if sys.argv[1:2] == ["--benchmark"]:
        benchmark()
    elif sys.argv[1:2] == ["--hammer"]:
        print(*hammer(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.stdin.buffer.read()))
    elif sys.argv[1:2] == ["--bare"]:
        serve_bare(sys.stdin.buffer.read())
    else:
        unittest.main()
