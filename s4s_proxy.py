#!/usr/bin/env python3
"""A SMART on FHIR patient portal in one file: for testing only, with made-up patients.

    python s4s_proxy.py --port 8000

starts an OAuth 2.0 authorization server (registration, sign-in, consent, tokens) in front of a
FHIR API that lets an app see one patient's record and nothing else. It needs Python 3.9 or newer
and nothing else. In a test:

    with s4s_proxy.Server() as server:
        token = server.issue_token(scope="patient/*.rs")["access_token"]

NEVER put real people's data behind it. Anybody who can reach it can sign in: the passwords are on
its first page, and its debug endpoints hand out tokens to whoever asks.

Why. An app that draws your blood pressure needs your health record. Apps used to ask for your
password: then they could do all that you can, for ever, and whoever robbed the app had it too. So
the app sends you to the portal instead. You sign in there, the app never sees how; you choose what
it may see, and until when; and the app gets a token that is good for that and nothing more. The
token must not pass through your browser, where addresses are kept, logged and passed on: so the
browser carries only a code, good for a minute, and the app trades it for the token by itself,
showing a secret that only it knows. The portal knows everybody; the app knows only the token; the
FHIR API knows only what the token stands for. That is OAuth 2.0 with PKCE; SMART App Launch says how
health records use it. This file is both, to be read from here downwards.

The story in nine messages: the app introduces itself, a person approves, the app reads. What stands
in <angle brackets> is new each time, or the portal's own address. At the right, the function to read.

  1  Where is everything? The app knows only the address of the FHIR API.          smart_configuration
     > GET /api/fhir/.well-known/smart-configuration
     < 200 {"token_endpoint": "<portal>/oauth/token", "capabilities": [...], ...}
  2  Who are you? The app names itself, and where browsers may be sent back to it.            register
     > POST /oauth/register
       {"redirect_uris": ["https://app.example/cb"], "token_endpoint_auth_method": "none"}
     < 201 {"client_id": "<client>", ...}
  3  The app sends the browser to the portal with its question.                              authorize
     > GET /oauth/authorize?response_type=code&client_id=<client>&redirect_uri=https://app.example/cb
       &scope=launch/patient%20patient/*.rs%20offline_access&state=<state>&aud=<portal>/api/fhir
       &code_challenge=<challenge>&code_challenge_method=S256
     < 303 <portal>/oauth/consent?request=<request>
     (Nobody is signed in yet, so that page sends the browser on to /login, which shows a form.)
  4  Who is at the browser? The person signs in, to the portal alone.                            login
     > POST /login
       username=daniel-adams&password=demo-password&next=/oauth/consent?request=<request>
       &form_token=<form>
     < 303 <portal>/oauth/consent?request=<request>
     (That page shows who asks, for what, and a form.)
  5  The person says yes: these categories, until that day. The browser carries a code.        consent
     > POST /oauth/consent
       request=<request>&decision=approve&patient_id=smart-1288992&security_labels=problems
       &approval_expires=<day>&form_token=<form>
     < 303 https://app.example/cb?code=<code>&state=<state>
  6  The app trades the code for tokens, with the secret behind <challenge>.            token_endpoint
     > POST /oauth/token
       grant_type=authorization_code&code=<code>&redirect_uri=https://app.example/cb
       &client_id=<client>&code_verifier=<verifier>
     < 200 {"access_token": "<access>", "token_type": "Bearer", "expires_in": 3600,
       "scope": "launch/patient patient/*.rs offline_access", "patient": "smart-1288992",
       "refresh_token": "<refresh>"}
  7  The app reads, showing the access token.                                                     fhir
     > GET /api/fhir/Condition/smart-Condition-14      Authorization: Bearer <access>
     < 200 {"resourceType": "Condition", "id": "smart-Condition-14", ...}
  8  Another patient's is not there. Every resource is judged before it leaves.         Access.may_see
     > GET /api/fhir/Condition/smart-Condition-120     Authorization: Bearer <access>
     < 404 {"resourceType": "OperationOutcome", ...}
  9  An hour later: new tokens for the refresh token, which is worth nothing from then on.     refresh
     > POST /oauth/token
       grant_type=refresh_token&refresh_token=<refresh>&client_id=<client>
     < 200 {"access_token": "<second access>", "refresh_token": "<second refresh>", ...}

A grant's life, in the rows of the tables (section 4):

    authorize        decide             exchange_code            refresh, again and again
    ------------     --------------     --------------------     ---------------------------------
    pending row  ->  grant row
                     code, 60 s     ->  code: spent
                                        access token, 1 h        another access token, 1 h
                                        refresh token        ->  refresh token: spent; another
                                        (offline_access)
    30 minutes                          no token outlives the day that the person chose

    If its app shows a code or refresh token a second time, two hold it, one of them a thief: the grant
    ends, with all its tokens. It also ends when the person stops sharing (/apps), or the app gives its
    refresh token back (/oauth/revoke).

Map, with reading times; `grep '^# ####'` lists the sections.

Part One, the protocol. Sections 1 to 4 are its tools; 5 to 11 go with a request from its arrival to the
records; the rest is what apps need besides. Sections 1 to 10 are its heart and take two hours; if you
stop there, you have read a whole OAuth server (messages 1, 7 and 8 are answered in 12 and 11).

    1  errors                                                5 min   what a client is told, in which shape
    2  secrets, PKCE                                         5 min   random values, hashes
    3  scopes                                               10 min   what an app may ask for
    4  the tables and the clock                             15 min   what is remembered, and until when
    5  request, response, route                             15 min   from a message to its endpoint
    6  clients with a secret, or none                       15 min   registration, authentication
    7  sign-in                                              10 min   who is at the browser
    8  the authorization request                            20 min   an ordered list of checks
    9  consent, and the code                                15 min   whose record, what, until when
   10  tokens                                               20 min   exchange, refresh, introspect, revoke
   11  the record's boundary                                30 min   whose a resource is, and the judge
   12  discovery                                             5 min   how an app finds the endpoints
   13  launch by a health record                             5 min   the other way to start an app
   14  identity                                              5 min   who signed in, told to the app
   15  keys, and backend services                           15 min   skip at first
   16  granular scopes                                       5 min   skip at first

Part Two, the records. Skip at first; each section can be read alone.

   17  search                                               40 min   what FHIR's parameters find
   18  embedded records                                     60 min   loading, reading, searching in SQLite
   19  a FHIR server behind                                 60 min   another server's records, judged
   20  sample data                                          20 min   rows of facts about three people

Part Three, the machinery. Skip at first; each section can be read alone.

   21  messages and JSON                                    15 min   as strangers send them
   22  signing                                              20 min   the arithmetic of RSA and ECDSA
   23  pages                                                30 min   HTML that escapes by default
   24  demo app                                             20 min   an app in one page of JavaScript
   25  settings, seeds, the portal                          20 min   what is there from the start
   26  test controls and Server                             20 min   what a test may do, an app may not
   27  HTTP                                                 20 min   sockets, threads, deadlines
   28  command line                                          5 min

Follow one request, downwards: of a person who has signed in, from the app's question to its answer.

     1  login                  who is at the browser; the cookie says so from now on
     2  authorize              the app's question, brought by the browser
     3  begin_authorization    an ordered list of checks: a page, or the app, is told what is wrong
     4  consent                whose record, what of it, until when, yes or no
     5  new_grant              the answer, checked
     6  decide                 it is written down; the browser carries a code back to the app
     7  token_endpoint         the app comes by itself now, and says who it is
     8  exchange_code          code and verifier become tokens, once
     9  spending               of several at once, one wins
    10  check_code             it comes from the one who asked for it
    11  fhir                   the app shows the access token to the FHIR API
    12  Access.may_see         every resource is judged before a byte of it leaves

Legend: the field's own names.

    FHIR           HL7's standard for health records as JSON over HTTP (versions DSTU2, STU3, R4); a resource
                   is a piece of a record; a Bundle holds several, a Binary a file, a Provenance says who made
                   what, an OperationOutcome what went wrong; a compartment is one patient's ($everything)
    SMART          SMART App Launch: how apps and FHIR servers use OAuth; SMART 1 and 2 are its versions
    EHR            electronic health record: the software of a clinic, which may launch apps
    S4S            Sync for Science, whose "SMART Example Server" of 2018 this file follows
    client         an app, as the authorization server knows it (RFC 6749 section 1.1): public if it
                   can keep no secret, confidential if it can; a backend service acts for no user
    user           a person who signs in; may open one patient's record or several
    session        a browser, known by its cookie; whoever signs in at it gets a new one
    patient        whose record it is; often, but not always, the user
    grant          one user's permission for one client to see one patient's record until a date
    redirect URI   the app's address to which the browser brings the answer
    state          a value that comes back with the answer, so that nobody can slip the app an answer
                   to a question that it did not ask
    code           the short-lived voucher that the browser carries back to the app
    PKCE           a secret made for one request, so that a stolen code is worth nothing (RFC 7636);
                   the app sends its hash first (challenge), itself later (verifier)
    token          in OAuth, a value that opens something: an access token is shown to the FHIR API, a
                   refresh token buys a new one. In FHIR, a kind of search parameter: system|code
    bearer         whoever holds it: a bearer token needs no further proof (RFC 6750)
    scope          what a token allows, in words like patient/Observation.rs (r: read, s: search);
                   offline_access asks for a refresh token
    issuer         the authorization server's name: its base URL
    audience       whom something is meant for: a FHIR server (aud), or who may read a signed statement
    nonce          a value that comes back in the id_token, so that no old one can be slipped in
    assertion      a statement that an app signs to prove who it is; its parts are called claims
    id_token       a statement that this server signs, of who signed in
    introspection  asking what a token is good for
    launch         how an app starts: by itself (standalone), or from a health record (EHR launch)
    launch context what is open where the app was started: patient, visit
    category       a kind of data the patient may leave out; S4S says "security label", in names too

Where you see a memory (`remembered`, lru_cache) or an import inside a function, its time was measured:
skip it.

The texts cited: RFC 6749 (OAuth 2.0), 6750 (bearer tokens), 7009 (revocation), 7591 (registration),
7636 (PKCE), 7662 (introspection), 8414 (discovery), 9207 (issuer in the answer), 9700 (security);
SMART is the SMART App Launch guide 2.2 (https://hl7.org/fhir/smart-app-launch/).

Licence: MIT, see LICENSE. The sample patients' facts: SMART sample patients, Apache-2.0,
Copyright 2015 Boston Children's Hospital.
"""
from __future__ import annotations

import argparse
import atexit
import base64
import calendar
import collections
import contextlib
import datetime
import email.utils
import functools
import hashlib
import hmac
import html
import http.server
import io
import itertools
import json
import math
import operator
import os
import re
import secrets
import selectors
import signal
import socket
import socketserver
import sqlite3
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlencode, urljoin, urlsplit

__version__ = "0.2.0"
__all__ = ["PortalError", "Server", "StartError", "__version__"]

Json = dict[str, Any]  # a JSON object, such as a FHIR resource
Headers = Sequence[tuple[str, str]]  # of an answer: names and values
FHIR_VERSIONS = {"r4": "4.0.1", "stu3": "3.0.1", "dstu2": "1.0.2"}  # our word -> FHIR's number

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])
MEMORIES: list[dict[Any, Any]] = []  # what `remembered` keeps; a reset empties them
MAX_MEMORY = 4 << 20                 # bytes of each


def remembered(weight: int) -> Callable[[AnyFunction], AnyFunction]:
    """functools.lru_cache for texts that anybody may send: bounded by what they and their answers take, which
    is some `weight` bytes a character. Long texts are not kept; a memory that is full is emptied."""
    def decorate(function: AnyFunction) -> AnyFunction:
        kept: dict[Any, Any] = {}
        size = 0
        MEMORIES.append(kept)

        @functools.wraps(function)
        def call(*key: Any) -> Any:
            nonlocal size
            try:
                return kept[key]
            except KeyError:
                answer = function(*key)
            cost = 500 + weight * sum(map(length, key))
            if cost <= MAX_MEMORY // 5:
                if size + cost > MAX_MEMORY or not kept:  # full, or emptied by a reset
                    kept.clear()
                    size = 0
                kept[key], size = answer, size + cost
            return answer
        return cast(AnyFunction, call)
    return decorate


def length(value: Any) -> int:
    """The characters in a text, or in those that a tuple or set holds."""
    if isinstance(value, (tuple, frozenset)):
        return 10 + sum(map(length, value))
    return len(value) if isinstance(value, (str, bytes)) else 10


# ======================================================================== Part One: the protocol
# It uses of what stands below: elements, as_list, id_of, reference_of, tokens_of, attachments, DOCUMENT_TYPES
# (what stands in a resource), search_table and parse_term (the records), LAST_SECOND, moment, http_date,
# same_address, APP_SCHEMES, ACTED_UPON (times and addresses), fhir_response, outcome, FHIR_TYPE,
# FHIR_TYPES, JSON_TYPES, take_parameters, parse_json, _JSON, BadRequest, printable, excerpt (messages),
# Connection (19), RsaKey, new_rsa_key, sign_jwt, read_jwt and verify (signing), error_page, sign_in_page,
# picker_page, consent_page, LOOK_JSON and LOOK_DIGEST (pages), check_tables (the portal), scrubbed (test
# controls).
#
# Most functions are handed the portal (section 25): portal.settings is the command line, portal.state the
# tables of section 4, portal.records the FHIR data, portal.clock the time; portal.client(id),
# portal.user(name), portal.patients_of(name) and portal.patient_name(name, id) look up; portal.is_ours(host)
# says whether a Host names us; portal.meet_fault(name) makes the trouble (fault) a test ordered;
# portal.recorded and portal.log keep what happened. portal.base and portal.browser_base: see section 5.


# ######################################################################## 1 errors


class StartError(Exception):
    """The server can't start; the message says why and how to mend it, in one line."""
    def __init__(self, message: str):
        super().__init__(printable(message))


class PortalError(Exception):
    """A refusal: `status` is HTTP's, `error` a code from the endpoint's specification, `description` for
    people. What it becomes on the way out, JSON or a page, the endpoint's kind says: see error_response."""
    aside = ""  # what the log alone is told: the words of a FHIR server behind
    def __init__(self, error: str, description: str, status: int = 400, headers: Headers = ()):
        description = excerpt(description)  # it may quote what came, and that be long
        super().__init__(f"{error}: {description}")
        self.error, self.description, self.status, self.headers = error, description, status, list(headers)

    @property
    def error_description(self) -> str:
        """The description in the characters that OAuth's answers may hold (RFC 6749 section 5.2)."""
        return re.sub(r"[^ !#-\[\]-~]", "?", self.description.replace('"', "'"))


class PageError(PortalError):
    """A refusal that stays a page, even where checks are answered by redirects (begin_authorization)."""


class RedirectError(PortalError):
    """An authorization error that travels to the app (RFC 6749 section 4.1.2.1): the browser goes to `url`.
    Only for a client and redirect URI found good: else we would send people anywhere (its section 10.15)."""
    def __init__(self, error: PortalError, url: str):
        super().__init__(error.error, error.description)
        self.url = url


class FhirError(PortalError):
    """An error of the FHIR API, an OperationOutcome: `error` is a code of FHIR's value set issue-type."""


class ScopeError(PortalError):
    """The token's scope is too small; any of `words` would do, the first is told (RFC 6750 section 3.1)."""
    def __init__(self, *words: str):
        super().__init__("insufficient_scope", f"the token's scope is too small; it would take {words[0]}",
                         403, [challenge(error="insufficient_scope", scope=words[0])])
        self.words = words


Good = TypeVar("Good")


def need(good: Good | None, description: str, error: str = "invalid_request", status: int = 400,
         kind: type[PortalError] = PortalError, headers: Headers = ()) -> Good:
    """Give back what is good; refuse with the description where it is None, false or empty."""
    if not good:
        raise kind(error, description, status, headers)
    return good


def challenge(scheme: str = "Bearer", **members: str) -> tuple[str, str]:
    """The header that tells how to prove oneself, and what was wrong with the proof (RFC 6750 section 3)."""
    told = [f'{name}="{value}"' for name, value in {"realm": "s4s", **members}.items()]
    return "WWW-Authenticate", f"{scheme} {', '.join(told)}"


# ######################################################################## 2 secrets, PKCE


def new_token() -> str:
    """A value nobody can guess: a random UUID, as S4S promised. It holds 122 random bits, as SMART asks; RFC
    6749 section 10.10 wants 128, so a production server draws more."""
    digits, variant = secrets.token_hex(15), secrets.choice("89ab")  # RFC 9562; uuid is slow to import
    return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{variant}{digits[15:18]}-{digits[18:]}"


def same_secret(one: str, other: str) -> bool:
    """Compare in a time that tells nothing about where two secrets differ."""
    return hmac.compare_digest(one.encode("utf-8", "replace"), other.encode("utf-8", "replace"))


def shorten(secret: str) -> str:
    """A secret as the log may show it: enough to tell two apart, too little to use."""
    return secret[:4] + "..."


def hash_secret(secret: str) -> str:
    """A client's secret as kept. SHA-256 is enough for what was drawn at random; a password needs more."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def hash_password(password: str, salt: str) -> str:
    """A person's password as kept: slow on purpose (50 ms), so that a stolen table is slow to guess from."""
    return hashlib.pbkdf2_hmac("sha256", password.encode("utf-8", "replace"), salt.encode(), 200_000).hex()


def base64url(data: bytes) -> str:
    """Bytes in the alphabet that URLs leave alone, without padding (RFC 7515 section 2)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def s256_challenge(verifier: str) -> str:
    """The PKCE challenge of a verifier (RFC 7636 section 4.2; the example is its appendix B's).

    >>> s256_challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    'E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM'
    """
    return base64url(hashlib.sha256(verifier.encode("ascii")).digest())


# ######################################################################## 3 scopes

# The suffixes of SMART 1 in the letters of SMART 2: create, read, update, delete, search.
LETTERS = {"read": "rs", "write": "cud", "*": "cruds"}
GRANTABLE_LETTERS = {"patient": "crus", "user": "crus", "system": "rs"}  # nobody deletes, no service writes
PLAIN_SCOPES = {          # the scopes that are no resource's, and what each lets the app do
    "openid": "know which account you sign in with",
    "fhirUser": "know who you are in the records",
    "profile": "know who you are in the records",  # what fhirUser was called at first
    "email": "know your e-mail address",
    "launch": "know whose record is open",
    "launch/patient": "know whose record you choose",
    "launch/encounter": "know which visit is open",
    "offline_access": "come back for new data when you are not there, until a day you choose or you stop it"}
SCOPE_SYNTAX = re.compile(r"(?= *[^ ])[!#-\[\]-~ ]{1,8192}")  # RFC 6749 section 3.3, but not without end
SCOPE_WORDS = "words of ASCII without quotes and backslashes, 8192 characters at most (RFC 6749 section 3.3)"
_RESOURCE_SCOPE = re.compile(r"(patient|user|system)/(\*|[A-Z][A-Za-z]{1,63})"
                             r"\.(read|write|\*|(?=[cruds])c?r?u?d?s?)(\?.*)?")


class ResourceScope(NamedTuple):
    """One scope of the form context/Type.letters (SMART, "Scopes for requesting FHIR Resources")."""
    context: str  # patient, user or system
    type: str     # a FHIR type, or * for all
    letters: str  # some of cruds, in this order
    text: str     # as the client wrote it
    constraints: tuple[tuple[str, str], ...] = ()  # what follows a ? narrows further: section 16

    def covers(self, other: ResourceScope) -> bool:
        """Whether this reaches all that `other` does, whatever the letters of both."""
        return (self.context == other.context and self.type in ("*", other.type)
                and constraints_cover(self.constraints, other.constraints))


@remembered(20)
def parse_scope(word: str) -> ResourceScope | None:
    """One word of a scope string as a resource scope; None if it is not one."""
    match = _RESOURCE_SCOPE.fullmatch(word)
    constraints = parse_constraints(match[4] or "") if match else None
    if not match or constraints is None:
        return None
    return ResourceScope(match[1], match[2], LETTERS.get(match[3], match[3]), word, constraints)


@remembered(40)
def resource_scopes(scope: str) -> tuple[ResourceScope, ...]:
    """The resource scopes within a scope string."""
    return tuple(parsed for parsed in map(parse_scope, scope.split()) if parsed)


def covered(registered: str, word: str) -> str:
    """What a registered scope string allows of a word, by meaning and not by spelling: some letters of a
    resource scope, any other word as it is; "" for nothing.

    >>> covered("patient/*.read patient/Condition.cu", "patient/Condition.cruds")
    'crus'
    >>> covered("user/*.rs", "patient/*.rs")  # they open different records
    ''
    """
    wanted = parse_scope(word)
    if wanted:
        kept, whose = scopes_by_value(registered), wanted.context
        # What can cover it is kept under its type or *, no ?param=value or any one of its own (section 16).
        places = [("", ""), *((name, min(_COMMA.split(values))) for name, values in wanted.constraints)]
        letters = set[str]()
        for type_name, place in itertools.product((wanted.type, "*"), places):
            for scope in kept.get((whose, type_name, *place), ()):
                if not letters.issuperset(scope.letters) and scope.covers(wanted):
                    letters.update(scope.letters)
        return "".join(letter for letter in wanted.letters if letter in letters)
    # Whoever may let the person choose a record may also be told which is open.
    wider = {"launch": "launch/patient", "profile": "fhirUser"}.get(word, word)
    return "" if {word, wider}.isdisjoint(registered.split()) else word


def negotiate_scope(asked: str, registered: str, contexts: Sequence[str] = ("patient", "user")) -> str:
    """What of the scope asked for can be granted: the words that this server knows, can do, and the client
    registered. Granting less than asked is allowed, saying so is a duty (RFC 6749 section 3.3). `contexts`:
    system/ is for backend services, which have no user and no consent; the others are for users.

    >>> negotiate_scope("openid patient/*.cruds patient/*.* user/*.rs", "openid patient/*.rs")
    'openid patient/*.rs patient/*.read'
    """
    need(SCOPE_SYNTAX.fullmatch(asked), f"scope {asked!r}: expected {SCOPE_WORDS}", "invalid_scope")
    granted = [grantable(word, registered, contexts) for word in dict.fromkeys(asked.split())]
    return " ".join(dict.fromkeys(filter(None, granted)))  # each once, in the order asked


def grantable(word: str, registered: str, contexts: Sequence[str]) -> str:
    """What of one word of a scope can be granted, "" for nothing. A word of SMART 1 (read,
    write, *) gives c and u both or not at all, and stays such a word if one says what is left. A constraint
    that can't be kept is an error: without it, more would be granted."""
    parsed = parse_scope(word)
    head, question, constraints = word.partition("?")
    if not parsed:
        need(not parse_scope(head), f"scope {word!r}: after the ? expected name=value pairs joined by &; "
             "modifiers, chained parameters and _filter are not supported", "invalid_scope")
        known = word in PLAIN_SCOPES and "user" in contexts
        return covered(registered, word) if known else ""
    granted = covered(registered, word) if parsed.context in contexts else ""
    letters = "".join(letter for letter in granted if letter in GRANTABLE_LETTERS[parsed.context])
    if head.rpartition(".")[2] in LETTERS:
        letters = letters if "c" in letters and "u" in letters else re.sub("[cu]", "", letters)
        letters = {"crus": "*", "cu": "write", "rs": "read"}.get(letters, letters)
    return f"{parsed.context}/{parsed.type}.{letters}{question}{constraints}" if letters else ""


def needs_patient(scope: str) -> bool:
    """Whether a scope is about one patient's record; patient/ alone says so too (SMART)."""
    return (any(parsed.context == "patient" for parsed in resource_scopes(scope))
            or not {"launch/patient", "launch/encounter"}.isdisjoint(scope.split()))


# ######################################################################## 4 the tables and the clock

# What a file says first, so that another version knows that it is not its own.
KEPT_BY = f"CREATE VIEW IF NOT EXISTS kept_by AS SELECT 's4s_proxy.py {__version__}' AS program;"
STATE_SCHEMA = KEPT_BY + """
-- Who may sign in. fhir_user: the resource that is this person. any_patient: a clinician opens every record.
-- claims: what else is told of the user (OpenID Connect Core section 5.1), as JSON by name.
CREATE TABLE IF NOT EXISTS users (
    username TEXT PRIMARY KEY, name TEXT NOT NULL, fhir_user TEXT, password_salt TEXT NOT NULL,
    password_hash TEXT NOT NULL, any_patient INTEGER NOT NULL DEFAULT 0, claims TEXT NOT NULL DEFAULT '{}');

-- Which records a user may open. is_user: the user's own. fhir_user: what the user is to this patient alone.
CREATE TABLE IF NOT EXISTS patients (
    username TEXT NOT NULL REFERENCES users, patient_id TEXT NOT NULL, name TEXT NOT NULL,
    is_user INTEGER NOT NULL, fhir_user TEXT, PRIMARY KEY (username, patient_id));

-- The apps. metadata is what RFC 7591 calls client metadata, as JSON. No secret: a public client, or one with
-- keys. registered_itself: by /oauth/register, and not by whoever runs this server.
CREATE TABLE IF NOT EXISTS clients (
    client_id TEXT PRIMARY KEY, secret_hash TEXT, metadata TEXT NOT NULL, created REAL NOT NULL,
    registered_itself INTEGER NOT NULL DEFAULT 0);
CREATE INDEX IF NOT EXISTS clients_by_secret ON clients (secret_hash);

-- Signed-in browsers. The id is the cookie's value.
CREATE TABLE IF NOT EXISTS sessions (
    session_id TEXT PRIMARY KEY, username TEXT NOT NULL REFERENCES users,
    started REAL NOT NULL, expires REAL NOT NULL);

-- Launches by the EHR that wait for their app. context is JSON: the members of the token response.
CREATE TABLE IF NOT EXISTS launches (
    launch TEXT PRIMARY KEY, client_id TEXT REFERENCES clients,  -- NULL until an app uses it, if not named
    username TEXT, patient_id TEXT, context TEXT NOT NULL, expires REAL NOT NULL);

-- Authorization requests that were found good and wait for the user's decision. details is JSON.
CREATE TABLE IF NOT EXISTS pending (
    request_id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES clients,
    details TEXT NOT NULL, expires REAL NOT NULL);

-- What users approved. A row stays when it has ended, so that a used token that returns is recognised.
CREATE TABLE IF NOT EXISTS grants (
    grant_id TEXT PRIMARY KEY, client_id TEXT NOT NULL REFERENCES clients,
    username TEXT REFERENCES users,               -- NULL: a backend service, which acts for nobody
    patient_id TEXT, scope TEXT NOT NULL, security_labels TEXT NOT NULL,  -- JSON list; empty: no limit
    approved REAL NOT NULL, approval_expires REAL NOT NULL, ended INTEGER NOT NULL DEFAULT 0,
    issuer TEXT,                                  -- the base URL that the app knows this server by
    redirect_uri TEXT, code_challenge TEXT,       -- what the code is bound to
    nonce TEXT, signed_in REAL,                   -- what the id_token repeats, and when the user signed in
    access_lifetime REAL,                         -- of its access tokens, where a test said it
    context TEXT NOT NULL DEFAULT '{}');          -- JSON: members of the token response beside patient
CREATE INDEX IF NOT EXISTS grants_by_user ON grants (username, client_id, patient_id);

-- Codes, access tokens and refresh tokens. Values are kept as they are because S4S's debug endpoint shows
-- them; a production server keeps hashes, so that anyone who steals the table can't use it.
CREATE TABLE IF NOT EXISTS tokens (
    token TEXT PRIMARY KEY, kind TEXT NOT NULL CHECK (kind IN ('code', 'access', 'refresh')),
    grant_id TEXT NOT NULL REFERENCES grants, scope TEXT NOT NULL,
    issued REAL NOT NULL, expires REAL NOT NULL,
    spent INTEGER NOT NULL DEFAULT 0,             -- code exchanged, refresh token rotated, token revoked
    refresh_token TEXT);                          -- of an access token: the one issued with it
CREATE INDEX IF NOT EXISTS tokens_by_grant ON tokens (grant_id);
CREATE INDEX IF NOT EXISTS tokens_by_refresh ON tokens (refresh_token);
CREATE INDEX IF NOT EXISTS codes_by_expiry ON tokens (expires) WHERE kind = 'code' AND NOT spent;

-- Assertions by which apps proved who they are; each counts once.
CREATE TABLE IF NOT EXISTS assertions (
    client_id TEXT NOT NULL REFERENCES clients, jti TEXT NOT NULL, expires REAL NOT NULL,
    PRIMARY KEY (client_id, jti));

-- The key that signs id_tokens, as its two primes in hexadecimal.
CREATE TABLE IF NOT EXISTS keys (p TEXT NOT NULL, q TEXT NOT NULL);

-- Pages of searches at the FHIR server behind: what the portal's own paging links stand for, and for whom.
CREATE TABLE IF NOT EXISTS pages (
    handle TEXT PRIMARY KEY, grant_id TEXT NOT NULL,   -- '': of /api/open-fhir
    path TEXT NOT NULL, url TEXT NOT NULL, expires REAL NOT NULL);
CREATE INDEX IF NOT EXISTS pages_by_grant ON pages (grant_id);

-- The secrets deleted last: requests recorded before still hold them, and must not show them (section 26).
CREATE TABLE IF NOT EXISTS forgotten (secret TEXT PRIMARY KEY);
""" + "".join(f"""
CREATE INDEX IF NOT EXISTS {table}_by_expiry ON {table} (expires);""" for table in (
    "sessions", "launches", "pending", "assertions", "pages")) + "".join(f"""
CREATE TRIGGER IF NOT EXISTS forget_{table} AFTER DELETE ON {table} BEGIN
    INSERT OR REPLACE INTO forgotten VALUES (OLD.{column});
    DELETE FROM forgotten WHERE rowid <= last_insert_rowid() - 10000;
END;""" for table, column in (("tokens", "token"), ("sessions", "session_id"), ("launches", "launch")))
Row = sqlite3.Row
MAX_KNOWN, MAX_KNOWN_OF_ONE = 5_000_000, 100_000  # characters a Store remembers: in all, of one query


@functools.cache
def empty_database(schema: str) -> sqlite3.Connection:
    """A database that servers copy: to read a schema takes SQLite twenty times as long (measured)."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    atexit.register(connection.close)
    connection.executescript(schema)
    return connection


class Store:
    """A SQLite database that many threads share.

    Theory of operation. There is one connection and one lock, so a `transaction` is alone from its first look
    to its last write. What `rows` found is remembered, by its SQL and values, until a transaction begins;
    until it ends nothing is remembered and other threads wait. So no reader of this code has to think of
    that. A memory that is full is emptied, a long answer is not kept, and a file, to which another process
    may write, has no memory.

    What we would like better: to forget only what a write has touched, but nobody tells us which tables a
    query read; and readers that do not wait for each other, but a connection for each was slower (measured).
    """
    def __init__(self, path: str | None, schema: str):
        """Open the file at `path`, or memory if None, and create the tables that are missing."""
        self._known: dict[tuple[Any, ...], list[Row]] = {}
        self._known_size, self._remembers = 0, path is None
        self._lock = threading.RLock()
        connection = None
        try:
            connection = sqlite3.connect(path or ":memory:", timeout=10, isolation_level=None,
                                         check_same_thread=False)
            connection.row_factory = sqlite3.Row
            if path:
                check_tables(connection, path, schema)
                connection.execute("PRAGMA journal_mode = WAL")    # a reader doesn't wait
                connection.execute("PRAGMA synchronous = NORMAL")  # a commit outlives the process
                connection.executescript(schema)
            else:
                empty_database(schema).backup(connection)
        except sqlite3.Error as error:
            if connection:
                connection.close()  # Windows lets nobody delete a file that is open
            raise StartError(f"--db {path}: {error}; expected a database of this program, or a new file")
        self.connection = connection

    def rows(self, sql: str, *values: Any) -> Sequence[Row]:
        """All rows of a query."""
        key = (sql, *values)
        known = self._known.get(key)
        if known is not None:
            return known
        with self._lock:
            rows = self.connection.execute(sql, values).fetchall()
            if self._remembers and not self.connection.in_transaction:
                texts = [value for row in (values, *rows) for value in row if isinstance(value, str)]
                size = 500 + 100 * len(rows) + sum(map(len, texts))
                if size <= MAX_KNOWN_OF_ONE:
                    if self._known_size >= MAX_KNOWN:
                        self.forget_rows()
                    self._known_size += size
                    self._known[key] = rows
            return rows

    def row(self, sql: str, *values: Any) -> Row | None:
        """The first row of a query, or None."""
        rows = self.rows(sql, *values)
        return rows[0] if rows else None

    def forget_rows(self) -> None:
        """Forget the rows looked up: something else is written now, or may be."""
        self._known, self._known_size = {}, 0

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of the writes in the block, or none if it raises. No other thread reads or writes meanwhile."""
        with self._lock:
            self.connection.execute("BEGIN IMMEDIATE")
            self.forget_rows()
            try:
                yield self.connection
                self.connection.execute("COMMIT")  # may fail too: a full disk
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        with self._lock:
            self.connection.close()


def forget_expired(database: sqlite3.Connection, table: str, now: float, which: str = "1") -> None:
    """Delete rows of `which` (SQL) that have expired, a few whenever one is added: nobody waits for many."""
    some = f"SELECT rowid FROM {table} WHERE {which} AND expires <= ? LIMIT 50"
    database.execute(f"DELETE FROM {table} WHERE rowid IN ({some})", (now,))


class Clock:
    """The one clock. Nothing else reads the time of day, so a test that moves it moves every expiry."""
    def __init__(self) -> None:
        self.offset = self._system = 0.0
        self._lock = threading.Lock()

    def now(self) -> float:
        """The portal's time, in Unix seconds. It goes on where the system's clock is set back: what has
        expired stays expired, and a used assertion stays used."""
        with self._lock:
            system = time.time()
            self.offset += max(self._system - system, 0)
            self._system = system
            return system + self.offset

    def advance(self, seconds: float) -> float:
        """Move the clock on; gives the new time."""
        with self._lock:
            self.offset += seconds
        return self.now()


# ######################################################################## 5 request, response, route

# Two words for our own address, since with --base-url it may have several. Started with --base-url
# https://portal.example --base-url http://portal:8000, and asked by an app in a container at the second,
#     portal.base(request)          is http://portal:8000, as the sender knows us: issuer, audience, links
#     portal.browser_base(request)  is https://portal.example, always the first: where people's browsers go.
# Without --base-url both are what the Host header says, which is why `check_host` doubts it. Without
# a request, portal.browser_base() is the address listened on.

MAX_RECORDED_BODY = 64 << 10  # how much of a request's body tests may see


def dispatch(portal: Portal, request: Request) -> Response:
    """Answer a request: the whole server without its sockets. ConnectionAbortedError: a test wants a drop."""
    route, status, request.era = find_route(request), 0, portal.records.era
    try:
        with portal.records.one_request:
            response = respond(portal, request, route)
        status = response.status
    finally:
        if not request.path.startswith("/oauth/debug/"):
            portal.recorded.append((  # and nothing else of it
                request.method, request.path, request.query, status, request.headers,
                request.body[:MAX_RECORDED_BODY], request.client_id, request.username))
    if route and route.cors:
        response.headers += ALLOWED_ORIGIN
    response.headers.append(NO_SNIFFING)
    return response


def find_route(request: Request) -> Route | None:
    """The route of a request's path; what its {} matched is request.rest. A // after a FHIR base is one /."""
    by_path, by_prefix = _routes_by_path()
    path = request.path
    if "//" in path:  # put together by hand from a FHIR base that ends in a slash
        path = re.sub("^(/api/(?:open-)?fhir/)/", r"\1", path)
    if path in by_path:
        return by_path[path]
    for prefix, route in by_prefix:
        if path.startswith(prefix) or path == prefix[:-1]:
            request.rest = path[len(prefix):]
            return route
    return None


@functools.cache
def _routes_by_path() -> tuple[dict[str, Route], list[tuple[str, Route]]]:
    """The routes by path; apart from them those that end in {}, with what stands before it."""
    return ({route.path: route for route in ROUTES if not route.path.endswith("{}")},
            [(route.path[:-2], route) for route in ROUTES if route.path.endswith("{}")])


def respond(portal: Portal, request: Request, route: Route | None) -> Response:
    """The response to a request, or to what went wrong with it."""
    try:
        return serve(portal, request, route)
    except ConnectionAbortedError:
        raise
    except PortalError as error:
        refusal = error.with_traceback(None)  # else it lives, with the request, until a garbage collection
    except sqlite3.OperationalError as error:  # a full disk, a file that can't be written: reading goes on
        portal.log(f"DATABASE {error} in {request.method} {scrubbed(portal, request.path)}")
        told = f"the database says: {error}; nothing was changed"
        refusal = PortalError("temporarily_unavailable", told, 503)
    except Exception as error:  # noqa: BLE001
        portal.log_bug(f"{request.method} {request.path}", error)
        refusal = PortalError("server_error", "this server has a bug; its log says where", 500)
    return error_response(portal, request, route, refusal)


def serve(portal: Portal, request: Request, route: Route | None) -> Response:
    """What the endpoint answers, after the checks that all share; OPTIONS is answered here."""
    if request.broken and not request.headers:  # its head is broken: only the first line can be used
        raise request.broken
    check_host(portal, request)
    if not route:
        raise PortalError("not_found", f"there is nothing at {request.path}", 404)
    if route.kind == "debug":
        check_debug(portal, request)
    method = "GET" if request.method == "HEAD" else request.method
    if method not in route.methods:
        head = ["HEAD"] if "GET" in route.methods else []
        allowed = ("Allow", ", ".join([*route.methods, *head, "OPTIONS"]))
        if method == "OPTIONS":
            return Response(204, headers=[allowed, *preflight(request)] if route.cors else [allowed])
        description = f"{method} is not possible here; possible are {allowed[1]}"
        raise PortalError("invalid_request", description, 405, [allowed])
    if request.broken and method not in ("PATCH", "DELETE"):  # their body is never read
        raise request.broken
    # Trouble that a test ordered. authorize makes its own, which may go to the app: begin_authorization.
    fault = portal.meet_fault(route.fault) if route.fault != "authorize" else None
    response = route.endpoint(portal, request)
    return fault.changed(response) if fault else response


def check_host(portal: Portal, request: Request) -> None:
    """Refuse names that aren't ours while anyone who can reach us is trusted: else a page elsewhere points
    its own name at this machine (DNS rebinding) and reads our answers. And without base URLs, where the name
    asked for becomes the issuer: else a false server that forwards to us would be the right aud."""
    settings = portal.settings
    trusting = settings.local or settings.serves_debug or settings.serves_open_fhir
    if (trusting or not settings.base_url) and not portal.is_ours(request.host):
        others = "" if settings.local else ", another IP address"
        description = f"Host is {request.host!r}; expected localhost, 127.0.0.1{others} or a --base-url"
        raise PortalError("misdirected_request", description, 421)


def check_debug(portal: Portal, request: Request) -> None:
    """Debug endpoints are there on loopback only, unless told, and obey no page of another site (CSRF)."""
    need(portal.settings.serves_debug, "the debug endpoints are off; --debug turns them on", "not_found", 404)
    other = another_site(portal, request)
    need(not other, f"{other}: debug endpoints obey no other site", "forbidden", 403)


def another_site(portal: Portal, request: Request) -> str:
    """What says that another site's page sends this, "" if nothing does. Browsers name the page (Origin) or
    tell how far away it is (Fetch Metadata); what is no browser sends neither."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "none")
    # A proxy may take https for us and pass on http. A Host is only believed if it is one of our names.
    ours = ["://".join(urlsplit(url)[:2]) for url in portal.settings.base_url]
    if portal.is_ours(request.host):
        ours.append(f"{request.scheme}://{request.host}")
    from_here = (not origin or origin in ours) and site in ("same-origin", "none")
    return "" if from_here else f"Origin is {origin!r}, Sec-Fetch-Site {site!r}"


def error_response(portal: Portal, request: Request, route: Route | None, error: PortalError) -> Response:
    """An error in the shape that this kind of endpoint's clients parse."""
    if isinstance(error, ScopeError):
        error.description += unregistered(portal.client(request.client_id), *error.words)
    request.note(f"refused: {error.error}: {error.description}{error.aside}")
    kinds = {"/api/": "fhir", "/oauth/": "oauth", "/.well-known/": "oauth"}
    first = request.path[:request.path.find("/", 1) + 1]  # /oauth/ of /oauth/x
    kind = route.kind if route else kinds.get(first, "page")
    if kind == "page":
        response = error_page(portal, error, request, route)
    elif kind == "fhir":
        response = Response(error.status, json.dumps(outcome(error)).encode(),
                            FHIR_TYPES.get(portal.settings.fhir_version, FHIR_TYPE),
                            [("Cache-Control", "no-store")])
    else:
        told = {"error": error.error, "error_description": error.error_description}
        response = json_response(told, error.status)
    response.headers += error.headers
    return response


NO_SNIFFING = ("X-Content-Type-Options", "nosniff")  # an answer is of the type that it says
ALLOWED_ORIGIN = [
    ("Access-Control-Allow-Origin", "*"),  # safe: no endpoint with CORS believes a cookie
    ("Access-Control-Expose-Headers",
     "ETag, Location, Content-Location, Last-Modified, Retry-After, WWW-Authenticate")]


def preflight(request: Request) -> list[tuple[str, str]]:
    """What CORS lets a page send: whatever headers it asks for, by name (* would not cover Authorization)."""
    names = re.sub(r"(?a)[^!#-'*+^`|~\w., -]", "", request.headers.get("access-control-request-headers", ""))
    return [("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
            ("Access-Control-Allow-Headers", names or "Authorization, Content-Type"),
            ("Access-Control-Max-Age", "600")]


class Request:
    """What came in. `headers` has lower-case names; `rest` is what a route's {} matched."""
    def __init__(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"",
                 scheme: str = "http"):
        self.method, self.headers, self.body, self.scheme = method, headers, body, scheme
        self.raw_path, _, self.query = target.partition("?")
        self.path = self.raw_path.rstrip("/") or "/"  # a trailing slash is ignored
        self.host, self.rest = headers.get("host", ""), ""
        self.client_id = self.username = ""     # learnt on the way, for the log
        self._pairs: list[tuple[str, str]] | None = None
        self.era = 0                            # resets before it: a later one takes what it relies on
        self.notes: list[str] = []              # what was decided on the way and why, for --verbose
        self.broken: PortalError | None = None  # why the body, or without headers the head, can't be used

    def note(self, text: str) -> None:
        """Tell what was decided, and which section says so. Secrets only through `shorten`."""
        self.notes.append(text)

    def pairs(self) -> list[tuple[str, str]]:
        """The query's parameters, in order; the same list each time."""
        if self._pairs is None:
            self._pairs = decode_pairs(self.query) if self.query else []
        return self._pairs

    @property
    def media_type(self) -> str:
        """The body's type, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def need_type(self, good: object, expected: str) -> None:
        """Refuse a body of another type, or in any coding (RFC 9110 sections 15.5.16 and 12.5.3)."""
        if not good:
            came = self.media_type or "missing"
            raise PortalError("invalid_request", f"Content-Type is {came}; expected {expected}", 415)
        coding = self.headers.get("content-encoding", "identity")
        need(coding.lower() == "identity", f"Content-Encoding is {coding}; expected none", status=415,
             headers=[("Accept-Encoding", "identity")])

    def form(self) -> list[tuple[str, str]]:
        """The body's parameters: application/x-www-form-urlencoded in UTF-8 (RFC 6749 appendix B)."""
        expected = "application/x-www-form-urlencoded"
        self.need_type(self.media_type == expected, expected)
        try:
            return decode_pairs(self.body.decode("utf-8"))
        except UnicodeDecodeError:
            raise PortalError("invalid_request", "the body is not UTF-8")

    def json(self) -> Json:
        """The body as a JSON object. Its type must say so: pages elsewhere may send text/plain, but this type
        only after a preflight, which opens no debug endpoint (CSRF)."""
        is_json = re.fullmatch(r"application/(fhir\+)?json(\+fhir)?", self.media_type)
        self.need_type(is_json, "application/json")
        return parse_json(self.body)

    def cookie(self, name: str) -> str:
        """A cookie's value, or "": also where two values came, of which a neighbour must have planted one."""
        # Not http.cookies: it drops all for one that it dislikes (localhost's come from every port), is slow
        # (quadratic), and decodes line breaks, which would get into Set-Cookie.
        pairs = re.findall(r"(?:^|;) *([^=; ]+)=([A-Za-z0-9_-]*) *(?=;|$)", self.headers.get("cookie", ""))
        values = {value for key, value in pairs if key == name}
        return values.pop() if len(values) == 1 else ""


class Fields:
    """The parameters of a query or a form; empty is the same as absent. Each at most once: of two, this
    server and one in front of it could each check another (RFC 6749 section 3.1)."""
    def __init__(self, pairs: Iterable[tuple[str, str]]):
        self.values: dict[str, str] = {}
        self.repeated: list[str] = []
        for name, value in pairs:
            if name in self.values:
                self.repeated.append(name)
            self.values[name] = value

    def get(self, name: str, default: str = "") -> str:
        """A parameter's value, or the default."""
        if name in self.repeated:
            raise PortalError("invalid_request", f"{name} is given more than once")
        return self.values.get(name) or default

    def need(self, name: str) -> str:
        """A parameter that must be there."""
        return need(self.get(name), f"{name} is missing")


def decode_pairs(text: str) -> list[tuple[str, str]]:
    """The name-value pairs of a query string or form body; PortalError where the encoding is broken."""
    broken = "%" in text and re.search(r"%(?![0-9A-Fa-f]{2})", text)
    need(not broken, "a % is not followed by two hexadecimal digits")
    need(text.count("&") < 1000, "more than 1000 parameters")
    need("%00" not in text and "\0" not in text, "a NUL character in a parameter")
    parts = [part.partition("=") for part in text.split("&") if part]
    try:
        return [(decode_plus(name, "strict"), decode_plus(value, "strict")) for name, _, value in parts]
    except ValueError as error:
        raise PortalError("invalid_request", f"parameters can't be decoded: {error}")


def decode_plus(text: str, errors: str = "replace") -> str:
    """Form decoding of a single name or value."""
    return unquote(text.replace("+", " "), errors=errors) if "%" in text or "+" in text else text


class Response:
    """What goes out."""
    def __init__(self, status: int, body: bytes = b"", content_type: str = "", headers: Headers = ()):
        self.status, self.body = status, body
        self.headers = [("Content-Type", content_type)] if content_type else []
        self.headers += headers


def json_response(value: Any, status: int = 200, headers: Headers = ()) -> Response:
    """JSON that no cache may keep: what OAuth's endpoints answer (RFC 6749 section 5.1)."""
    return Response(status, json.dumps(value).encode("ascii"), "application/json",
                    [("Cache-Control", "no-store"), ("Pragma", "no-cache"), *headers])


def redirect(url: str, cookies: Sequence[str] = ()) -> Response:
    """See other: the browser goes there with GET (RFC 9110 section 15.4.4)."""
    return Response(303, headers=[("Location", url), ("Cache-Control", "no-store"),
                                  *(("Set-Cookie", cookie) for cookie in cookies)])


def with_query(url: str, **parameters: str) -> str:
    """A URL with parameters added, its own query kept (RFC 6749 section 3.1.2)."""
    return url + ("&" if "?" in url else "?") + urlencode(parameters, quote_via=quote, safe="")


Endpoint = Callable[["Portal", Request], Response]


class Route(NamedTuple):
    """One endpoint, as `route` declares it."""
    methods: tuple[str, ...]
    path: str           # {} at its end stands for the rest
    spec: str           # the text it implements
    cors: bool          # whether pages of any origin may read it
    kind: str           # oauth, fhir, page or debug: gives errors their shape
    fault: str          # the name by which a test makes it fail
    endpoint: Endpoint


ROUTES: list[Route] = []


def route(rule: str, spec: str, cors: bool = False, kind: str = "oauth",
          fault: str = "") -> Callable[[Endpoint], Endpoint]:
    """Declare the endpoint that serves `rule`, such as "GET,POST /login"."""
    methods, path = rule.split(" ")

    def declare(endpoint: Endpoint) -> Endpoint:
        ROUTES.append(Route(tuple(methods.split(",")), path, spec, cors, kind, fault, endpoint))
        return endpoint
    return declare


@route("GET /health", "for monitors", cors=True)
def health(portal: Portal, request: Request) -> Response:
    """Whether the server is up, and its version."""
    return json_response({"status": "ok", "version": __version__})


# ######################################################################## 6 clients with a secret, or none


@route("POST /oauth/register", "RFC 7591 section 3", cors=True, fault="register")
def register(portal: Portal, request: Request) -> Response:
    """Register an app (RFC 7591 section 3.1): JSON in, id and secret out."""
    return json_response(register_client(portal, request.json()), 201)


def register_client(portal: Portal, metadata: Json) -> Json:
    """Register an app; gives its id, its secret if it has one, and the metadata (RFC 7591 section 3.2.1). Id
    and secret are drawn here: an app that chose its own id could pass for another."""
    kept, client_id, now = client_metadata(metadata), new_token(), portal.clock.now()
    kept["client_name"] = kept.get("client_name") or client_id
    answer = {**kept, "client_id": client_id, "client_id_issued_at": int(now)}
    secret_hash = None
    if kept["token_endpoint_auth_method"].startswith("client_secret"):
        answer.update(client_secret=new_token(), client_secret_expires_at=0)
        secret_hash = hash_secret(answer["client_secret"])
    with portal.state.transaction() as database:
        database.execute("INSERT INTO clients VALUES (?, ?, ?, ?, 1)",
                         (client_id, secret_hash, json.dumps(kept), now))
    return answer


class Client(NamedTuple):
    """An app, as registered."""
    client_id: str
    secret_hash: str | None          # None: a public client, which can keep no secret, or one that has keys
    metadata: Json                   # RFC 7591 section 2, as `client_metadata` has checked it
    registered_itself: bool = False  # by /oauth/register, and not by whoever runs this server

    @property
    def name(self) -> str:
        """What people are shown."""
        return str(self.metadata.get("client_name") or self.client_id)

    @property
    def scope(self) -> str:
        """What the client registered for; the most it can get."""
        return str(self.metadata["scope"])

    @property
    def auth_method(self) -> str:
        """How the client proves who it is; none: it is public."""
        return str(self.metadata["token_endpoint_auth_method"])

    def may_use(self, grant_type: str) -> bool:
        """Whether the client registered for a grant type."""
        return grant_type in self.metadata["grant_types"]


# Client metadata (RFC 7591 section 2; OpenID Connect Registration; launch_uris and security_labels: our own).
DEFAULT_SCOPE = "openid fhirUser launch launch/patient patient/*.rs offline_access"
METADATA_STRINGS = frozenset((
    "client_name", "scope", "token_endpoint_auth_method", "token_endpoint_auth_signing_alg", "software_id",
    "software_version", "application_type", "subject_type", "id_token_signed_response_alg"))
METADATA_URLS = frozenset(("client_uri", "logo_uri", "tos_uri", "policy_uri", "jwks_uri"))
METADATA_LISTS = frozenset((
    "redirect_uris", "grant_types", "response_types", "contacts", "launch_uris", "security_labels"))
METADATA_CHOICES: dict[str, Sequence[str]] = {
    "grant_types": ("authorization_code", "refresh_token", "client_credentials"), "response_types": ("code",),
    "token_endpoint_auth_method": ("none", "client_secret_basic", "client_secret_post", "private_key_jwt"),
    "token_endpoint_auth_signing_alg": ("RS384", "ES384"), "id_token_signed_response_alg": ("RS256",),
    "subject_type": ("public",)}


def client_metadata(metadata: Json, listed: bool = False) -> Json:
    """Client metadata, checked, with its defaults. What is unknown is not registered and not given back: an
    app would take it for a promise (RFC 7591 section 3.2.1). client_name#fr is French (section 2.2).
    `listed`: by whoever runs this server, in --client or --fixtures; others have less room."""
    members = METADATA_STRINGS | METADATA_URLS | METADATA_LISTS | {"jwks"}
    known = {name: value for name, value in metadata.items() if name.partition("#")[0] in members}
    kept = {"redirect_uris": [], "grant_types": ["authorization_code", "refresh_token"],
            "scope": DEFAULT_SCOPE, "token_endpoint_auth_method": "client_secret_basic", **known}
    need(listed or len(json.dumps(kept, default=str)) <= 64 << 10, "the metadata of an app that registers "
         "itself: expected 64 KiB at most, as JSON in ASCII", "invalid_client_metadata")
    for name in known:
        check_member(kept, name)
    code = ["code"] if "authorization_code" in kept["grant_types"] else []  # none: a backend service
    kept.setdefault("response_types", code)
    # The answer "code" and its grant type come together, or the app could ask for what it can't use.
    need_member(set(kept["response_types"]) == set(code), kept, "response_types",
                "code with the grant type authorization_code, and only then (RFC 7591 section 2.1)")
    # Where codes may go is settled now, whole (RFC 7591 section 5, 9700 section 2.1). So are launches.
    uris = kept["redirect_uris"]
    schemes = "any that neither browsers nor systems act on" if listed else (
        f"with a period in it, or {', '.join(sorted(APP_SCHEMES))}; others only by --client or --fixtures")
    good = all(is_redirect_uri(uri, listed) for uri in uris) and (uris or not code)
    need_member(good, kept, "redirect_uris",
                f"one or more absolute URIs without a fragment: http, https or an app's scheme ({schemes})")
    launch_uris = map(is_web_url, kept.get("launch_uris", []))
    need_member(all(launch_uris), kept, "launch_uris", "absolute http or https URLs")
    # Scopes come back in headers, and must not break out of them.
    need_member(SCOPE_SYNTAX.fullmatch(kept["scope"]), kept, "scope", SCOPE_WORDS)
    check_keys(kept)
    return kept


def need_member(good: object, metadata: Json, name: str, expected: str) -> None:
    """Refuse a member that is not good, by its name (RFC 7591 section 3.2.2)."""
    if not good:
        error = "invalid_redirect_uri" if name == "redirect_uris" else "invalid_client_metadata"
        came = json.dumps(metadata.get(name), default=str)
        raise PortalError(error, f"{name}: expected {expected}, got {came}")


def check_member(metadata: Json, name: str) -> None:
    """A member's type, and that it is something this server can do (RFC 7591 section 2)."""
    value, member = metadata[name], name.partition("#")[0]
    if member in METADATA_STRINGS:
        need_member(isinstance(value, str), metadata, name, "a string")
    if member in METADATA_LISTS:
        strings = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
        need_member(strings, metadata, name, "an array of strings")
    if member in METADATA_URLS:  # our pages may link to them: javascript: would run in our name
        need_member(is_web_url(value), metadata, name, "an absolute http or https URL")
    choices = (*CATEGORIES, *OLD_CATEGORIES) if name == "security_labels" else METADATA_CHOICES.get(name)
    if choices:
        chosen = [value] if isinstance(value, str) else value
        need_member(set(chosen) <= set(choices), metadata, name, f"only {', '.join(choices)}")


def check_keys(metadata: Json) -> None:
    """Refuse keys that are weak or came with their private half (key_set), and private_key_jwt without keys
    (SMART, "Client Authentication: Asymmetric"). Keys of other kinds may be for something else."""
    given = {"jwks", "jwks_uri"} & metadata.keys()
    # Of two sets, one would be forgotten when a stolen key is taken out of the other (RFC 7591 section 2).
    need_member(len(given) < 2, metadata, "jwks_uri", "not to stand beside jwks")
    try:
        for key in key_set(metadata["jwks"]) if "jwks" in given else []:
            if key.get("kty") == "RSA":
                verify(key, "RS384", b"", b"")  # ValueError for a key that is weak, or is none
            elif key.get("kty") == "EC" and key.get("crv") == "P-384":
                verify(key, "ES384", b"", b"")
    except ValueError as error:
        raise PortalError("invalid_client_metadata", f"jwks: {error}")
    if metadata["token_endpoint_auth_method"] == "private_key_jwt":
        need(given, "private_key_jwt needs jwks or jwks_uri", "invalid_client_metadata")


def is_web_url(uri: Any) -> bool:
    """Whether something is an absolute http or https URL, without user and password."""
    if not isinstance(uri, str) or not re.fullmatch(r"(?i:https?)://[!-\[\]-~]+", uri):
        return False
    try:
        parts = urlsplit(uri)
        return bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return False


def is_redirect_uri(uri: str, listed: bool = False) -> bool:
    """Whether browsers may be sent to a URI: http, https or an app's private scheme, without fragment (RFC
    6749 section 3.1.2, RFC 8252 section 7.1). `listed`: by whoever runs this server.

    >>> is_redirect_uri("org.example.app:/cb"), is_redirect_uri("app:/cb"), is_redirect_uri("app:/cb", True)
    (True, False, True)
    """
    private = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]*):[!-~]+", uri)
    scheme = private[1].lower() if private else "about"  # no URI: one of ACTED_UPON
    an_apps = (listed or "." in scheme or scheme in APP_SCHEMES) and not re.fullmatch(ACTED_UPON, scheme)
    return "#" not in uri and (is_web_url(uri) or an_apps)


def without_loopback_port(uri: str) -> str:
    """A URI less the port, if its host is an address of loopback: an app gets another there each time."""
    return re.sub(r"^(http://(?:127\.0\.0\.1|\[::1\])):\d{1,5}(?=[/?]|$)", r"\1", uri)


def authenticate_client(portal: Portal, request: Request, form: Fields) -> Client:
    """Which client asks, by the one proof that came. Two are refused (RFC 6749 section 2.3): they might be of
    two clients, and one part of a server believe one, another the other."""
    basic, posted = basic_credentials(request), form.get("client_secret")
    assertion = form.get("client_assertion") or form.get("client_assertion_type")
    need(bool(basic) + bool(posted) + bool(assertion) <= 1, "client authentication is given twice; expected "
         "one of the Authorization header, client_secret and client_assertion")
    if assertion:  # signed by the client's key: section 15
        client = client_of_assertion(portal, request, form)
    else:          # id and secret, in the Authorization header or the form; a public client's id alone
        client = client_of_secret(portal, form, *(basic or (form.get("client_id"), posted)))
    request.client_id = client.client_id
    public = client.auth_method == "none"
    proof = "a public client, its id is no proof" if public else f"proven by {client.auth_method}"
    request.note(f"client {client.client_id}: {proof} (RFC 6749 section 2.3)")
    return client


def basic_credentials(request: Request) -> tuple[str, str] | None:
    """Client id and secret of HTTP Basic, as they came; None without such a header."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        client_id, secret = base64.b64decode(value.strip(), validate=True).decode("utf-8").split(":", 1)
    except ValueError:
        raise invalid_client("the Basic credentials are not base64 of client_id:client_secret")
    return client_id, secret


def client_of_secret(portal: Portal, form: Fields, given_id: str, given_secret: str) -> Client:
    """The client of an id and a secret, or of an id without one; PortalError 401, 400 if two ids differ."""
    # RFC 6749 section 2.3.1 form-encodes both before base64; many clients don't. Either way is taken.
    pairs = [(given_id, given_secret), (decode_plus(given_id), decode_plus(given_secret))]
    need(form.get("client_id", given_id) in (given_id, decode_plus(given_id)),
         "client_id differs from the one in the Authorization header")
    if not given_id:
        raise invalid_client("no client authentication: send HTTP Basic, client_id and client_secret, "
                             "client_assertion, or a public client's client_id")
    for client_id, secret in pairs:
        client = portal.client(client_id)
        if client and is_proven(client, secret):
            return client
    # The same words for a wrong proof and for no such client: who is registered is not for all to know.
    raise invalid_client(f"client {given_id!r}: expected the id and the secret of a client registered here "
                         "(a public one has no secret, one registered for private_key_jwt an assertion)")


def is_proven(client: Client, secret: str) -> bool:
    """Whether this secret, "" for none, is all that the client has to show. A client with keys has more."""
    if client.secret_hash:
        return same_secret(hash_secret(secret), client.secret_hash)
    return client.auth_method == "none" and not secret


def invalid_client(description: str) -> PortalError:
    """401, naming a scheme by which an app could prove who it is (RFC 6749 section 5.2)."""
    return PortalError("invalid_client", description, 401, [challenge("Basic")])


# ######################################################################## 7 sign-in

SESSION_SECONDS = 1800


def to_sign_in(portal: Portal, request: Request, back: str, username: str = "") -> Response:
    """Send the browser to sign in and then back; `username` is filled in."""
    hint = {"username": username} if username else {}
    return redirect(with_query(portal.browser_base(request) + "/login", next=back, **hint))


@route("GET,POST /login", "S4S", kind="page")
def login(portal: Portal, request: Request) -> Response:
    """The sign-in form; posted, it signs a user in."""
    if request.method != "POST":
        fields = Fields(request.pairs())
        # Daniel's name stands there, as in the S4S original; without him (--data none), the first one's.
        row = portal.state.row("SELECT * FROM users ORDER BY username <> 'daniel-adams', rowid LIMIT 1")
        username = fields.get("username", row["username"] if row else "")
        return sign_in_page(portal, request, username, "", local_path(fields.get("next")))
    form = guarded_form(portal, request)
    username, next_path = form.get("username"), local_path(form.get("next"))
    # An unknown user costs the time of a wrong password, or strangers could learn who has an account.
    user = portal.user(username)
    salt, kept_hash = (user["password_salt"], user["password_hash"]) if user else ("nobody", "")
    if not same_secret(hash_password(form.get("password"), salt), kept_hash):
        return sign_in_page(portal, request, username, "User name and password do not match.", next_path)
    session_id = start_session(portal, request, username)
    return redirect(portal.browser_base(request) + next_path, [set_cookie(portal, request, session_id)])


def local_path(text: str) -> str:
    """Where to go after signing in: a path of this server, or a link with our name on it could lead anywhere,
    to a page that asks for the password once more (open redirect).

    >>> [local_path(text) for text in ("/", "/apps?x=1", "https://evil.example/", "//evil.example")]
    ['/', '/apps?x=1', '/apps', '/apps']
    """
    return text if re.fullmatch(r"/([A-Za-z0-9][A-Za-z0-9/_.-]*(\?[A-Za-z0-9=&_.%-]*)?)?", text) else "/apps"


def start_session(portal: Portal, request: Request, username: str) -> str:
    """Sign a user in; gives the session's id. Always a new one: an id that somebody planted in the browser,
    and so knows, must not become this user's (session fixation). The browser's earlier session ends."""
    session_id, now = new_session_id(), portal.clock.now()
    with portal.state.transaction() as database:
        need(request.era == portal.records.era, "All was reset meanwhile. Sign in again.", kind=PageError)
        forget_expired(database, "sessions", now)
        database.execute("DELETE FROM sessions WHERE session_id = ?", (browser_session(portal, request),))
        database.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)",
                         (session_id, username, now, now + SESSION_SECONDS))
    return session_id


@route("POST /logout", "S4S", kind="page")
def logout(portal: Portal, request: Request) -> Response:
    """Sign out: the session ends on the server, so a cookie copied before is worth nothing."""
    form = guarded_form(portal, request)
    with portal.state.transaction() as database:
        database.execute("DELETE FROM sessions WHERE session_id = ?", (browser_session(portal, request),))
    return redirect(portal.browser_base(request) + local_path(form.get("next", "/")))


def session_user(portal: Portal, request: Request) -> Row | None:
    """The user signed in at this browser, or None; noted for the log."""
    sql = "SELECT * FROM sessions JOIN users USING (username) WHERE session_id = ? AND expires > ?"
    user = portal.state.row(sql, browser_session(portal, request), portal.clock.now())
    if user:
        request.username = user["username"]
    return user


def guarded_form(portal: Portal, request: Request) -> Fields:
    """A posted form, after a check that our own page sent it: else any site could click in the user's name
    (CSRF). A site that shares our domain, or a port of this machine, can plant a cookie whose form token it
    knows; then the browser's word for where the form stood (Sec-Fetch-Site) still refuses it."""
    form, session_id = Fields(request.form()), browser_session(portal, request)
    ours = session_id and same_secret(form.get("form_token"), form_token(session_id))
    here = request.headers.get("sec-fetch-site", "none") in ("same-origin", "none")
    wrong = "stood on another site (Sec-Fetch-Site)" if ours else (
        "is not from this browser's session: somebody signed in since, or cookies are off")
    again = f"This form {wrong}. Go back to the start page and try again."
    need(ours and here, again, "forbidden", 403, PageError)
    return form


def form_token(session_id: str) -> str:
    """A hidden field that shows a form is of our page: made from the cookie, which no other site can read."""
    return hmac.new(session_id.encode(), b"s4s form token", hashlib.sha256).hexdigest()


def new_session_id() -> str:
    """A session's id: 192 random bits."""
    return secrets.token_urlsafe(24)


def browser_session(portal: Portal, request: Request) -> str:
    """The session id in this browser's cookie, "" if none; sign_in_page draws one before a sign-in. What
    `new_session_id` can't have drawn a neighbour planted: it gets into no header and no page."""
    value = request.cookie(cookie_name(portal, request))
    return value if re.fullmatch(r"[A-Za-z0-9_-]{32}", value) else ""


def cookie_name(portal: Portal, request: Request) -> str:
    """The session cookie's name, of the address that browsers see: two portals on a host need two names. With
    __Host- the browser takes it over https only, and from this host alone: else a neighbour plants a session
    of its own, and the user acts in that (RFC 6265bis section 4.1.3.2)."""
    scheme, _, place = portal.browser_base(request).partition("://")
    return ("__Host-" if scheme == "https" else "") + "s4s_session_" + re.sub(r"[^A-Za-z0-9.-]", "_", place)


def set_cookie(portal: Portal, request: Request, value: str) -> str:
    """A Set-Cookie value. HttpOnly: no script that got into a page can read it. SameSite: other sites' forms
    are sent without it (CSRF). Secure, where we have https: nobody on the way hears it."""
    secure = "; Secure" if portal.browser_base(request).startswith("https:") else ""
    return f"{cookie_name(portal, request)}={value}; Path=/; HttpOnly; SameSite=Lax{secure}"


# ######################################################################## 8 the authorization request

PENDING_SECONDS, CODE_SECONDS, ACCESS_SECONDS, LAUNCH_SECONDS, DAY = 1800, 60, 3600, 300, 86400
MAX_PENDING = 2000  # that wait for a decision: anybody may ask, and each may hold 40 KiB


@route("GET,POST /oauth/authorize", "RFC 6749 section 4.1.1, RFC 7636, SMART", kind="page", fault="authorize")
def authorize(portal: Portal, request: Request) -> Response:
    """An app asks for a user's permission: check the request, remember it, send the browser on to consent."""
    fields = Fields(request.form() if request.method == "POST" else request.pairs())
    base = portal.browser_base(request)
    try:
        request_id = begin_authorization(portal, request, fields, base)
    except RedirectError as error:
        return redirect(error.url)
    return redirect(f"{base}/oauth/consent?request={request_id}")


def begin_authorization(portal: Portal, request: Request, fields: Fields, issuer: str) -> str:
    """Check an authorization request and remember it; gives the id by which the consent page knows it. A
    failed check is a PortalError for the person at the browser, or a RedirectError for the app."""
    asked = Authorization(portal, request, fields, issuer)
    for check in PAGE_CHECKS:
        check(asked)
    try:
        portal.meet_fault("authorize")
        for check in REDIRECT_CHECKS:
            check(asked)
    except PageError:  # a test ordered a bare status
        raise
    except PortalError as error:
        request.note(f"refused, and the app is told: {error} (RFC 6749 section 4.1.2.1)")
        raise RedirectError(error, back_to_app(
            portal, asked.redirect_uri, fields.values.get("state", ""), asked.issuer,
            error=error.error, error_description=error.error_description))
    request_id, now = new_token(), portal.clock.now()
    details = {"redirect_uri": asked.redirect_uri, "scope": asked.scope, "issuer": asked.issuer,
               "launch": asked.launch, "signed_in_since": asked.signed_in_since, "asked_at": issuer,
               **{name: fields.get(name) for name in ("state", "code_challenge", "nonce", "login_hint")}}
    with portal.state.transaction() as database:
        forget_expired(database, "pending", now)
        database.execute("INSERT INTO pending VALUES (?, ?, ?, ?)",
                         (request_id, asked.client.client_id, json.dumps(details), now + PENDING_SECONDS))
        database.execute("DELETE FROM pending WHERE rowid <= last_insert_rowid() - ?", (MAX_PENDING,))
    return request_id


class Authorization:
    """An authorization request on its way through the checks, and what they find out (right: which does)."""
    def __init__(self, portal: Portal, request: Request, fields: Fields, issuer: str):
        self.portal, self.request, self.fields = portal, request, fields
        self.client: Client                         # check_client
        self.redirect_uri = ""                      # check_redirect_uri
        self.issuer = issuer                        # check_audience, if aud uses another of our names
        self.scope = ""                             # check_scope: what can be granted
        self.signed_in_since = 0.0                  # check_prompt: the user must have signed in after this
        self.launch: Json = {}                      # check_launch: the user, patient and context of the EHR's


def check_lengths(asked: Authorization) -> None:
    """What is kept until the user has decided is bounded, or strangers could fill the memory with it."""
    for name in ("state", "nonce", "login_hint", "redirect_uri"):
        need(len(asked.fields.values.get(name, "").encode()) <= 8 << 10, f"{name} is longer than 8 KiB")


def check_client(asked: Authorization) -> None:
    """Which app asks (noted for the log). Not yet a reason to send the browser anywhere."""
    client_id = asked.fields.need("client_id")
    asked.client = need(asked.portal.client(client_id), f"client_id {client_id!r} is not registered here: "
                        "do so at /oauth/register, or start this server with --client", "invalid_client")
    asked.request.client_id = client_id


def check_redirect_uri(asked: Authorization) -> None:
    """One of those registered, to the letter, or somebody else may get the code (RFC 6749 section 3.1.2.3).
    Only the port may differ, of a native app that listens on this machine (RFC 8252 section 7.3, RFC 9700
    section 4.1.3), and only with PKCE: another program that listens there gets a code, but no verifier."""
    uri, client = asked.fields.need("redirect_uri"), asked.client
    registered = uris_of(client, asked.portal.browser_base(asked.request), "redirect_uris")
    bound = asked.portal.settings.pkce or asked.fields.values.get("code_challenge")
    native = bound and client.auth_method == "none" and is_web_url(uri)
    but_for_port = native and without_loopback_port(uri) in map(without_loopback_port, registered)
    need(uri in registered or but_for_port, f"redirect_uri {uri!r} is not one of {client.client_id!r}'s: "
         f"expected, to the letter, {' or '.join(registered)} (RFC 6749 section 3.1.2.3)")
    asked.redirect_uri = uri
    asked.request.note(f"redirect_uri {uri} was registered by {client.client_id}; errors now go there")


def uris_of(client: Client, base: str, member: str) -> list[str]:
    """A client's redirect_uris or launch_uris; the demo app's are paths of this server, wherever that is."""
    return [base + uri if uri.startswith("/") else uri for uri in client.metadata.get(member, [])]


def check_audience(asked: Authorization) -> None:
    """The FHIR server that the app means must be this one: a false one may name us as its portal, to be shown
    tokens that open ours (SMART). Finds the issuer: what the app calls us. In RFC 8707 aud is `resource`."""
    settings, fields = asked.portal.settings, asked.fields
    name = "aud" if fields.get("aud") else "resource"
    if not fields.get(name):
        need(not settings.strict, "aud is missing (SMART)")
        return  # S4S's apps may leave it out
    audience = fields.get(name).rstrip("/")
    bases = settings.base_url or [asked.portal.base(asked.request)]
    ours = [base for base in bases if same_address(audience, base + "/api/fhir")]
    need(ours, f"{name} is {audience!r}; this server's FHIR base is {asked.issuer}/api/fhir",
         "invalid_target" if name == "resource" else "invalid_request")
    # Without base URLs, all our documents call us what the app called us: so what it sent is our name.
    asked.issuer = ours[0] if settings.base_url else audience[:-len("/api/fhir")]
    asked.request.note(f"aud is this server's FHIR base, known to the app as {asked.issuer}")


def check_state(asked: Authorization) -> None:
    """No parameter twice (RFC 6749 section 3.1); and state, by which the app knows that it asked (SMART)."""
    need(not asked.fields.repeated, f"{', '.join(asked.fields.repeated)}: given more than once")
    asked.fields.need("state")


def check_response_type(asked: Authorization) -> None:
    """Only the code flow, and only the answer in the query; from a client that registered for it. Plain
    parameters, none in a signed object (OpenID Connect Core sections 6 and 7.2.1)."""
    kind, mode = asked.fields.need("response_type"), asked.fields.get("response_mode", "query")
    need(kind == "code", f"response_type is {kind!r}; expected code", "unsupported_response_type")
    need(mode == "query", f"response_mode is {mode!r}; expected query")
    need(asked.client.may_use("authorization_code"),
         f"client {asked.client.client_id!r} did not register for authorization_code", "unauthorized_client")
    for name in ("request", "request_uri", "registration"):
        need(not asked.fields.get(name), f"{name}: give plain parameters instead", f"{name}_not_supported")


def check_pkce(asked: Authorization) -> None:
    """A challenge from every public client (see --no-pkce, --strict): it ties code to app (RFC 7636)."""
    code_challenge, method = asked.fields.get("code_challenge"), asked.fields.get("code_challenge_method")
    settings = asked.portal.settings
    if not code_challenge:
        required = settings.strict or (settings.pkce and asked.client.auth_method == "none")
        way_out = "--strict asks every app for it" if settings.strict else "--no-pkce lets in apps without"
        need(not required, f"code_challenge is missing (PKCE, RFC 7636); {way_out}")
        need(not method, "code_challenge_method is given without code_challenge")
        asked.request.note("no PKCE: this client may go without, by its secret or keys or by --no-pkce")
        return
    # "plain" would send the verifier itself through the browser, for a thief to read (RFC 7636 section 7.2).
    need(method == "S256", f"code_challenge_method is {method or 'missing, so plain'}; expected S256")
    need(re.fullmatch(r"[A-Za-z0-9_-]{43}", code_challenge),
         "code_challenge: expected 43 characters of base64url")
    asked.request.note("PKCE: only who knows the verifier can exchange the code (RFC 7636 section 4.6)")


def check_scope(asked: Authorization) -> None:
    """The part of the scope that can be granted; an error if there is none. No offline_access for a client
    that did not register for refresh tokens."""
    wanted = asked.fields.need("scope")
    words = served_scope(asked.portal, wanted, asked.client.scope).split()
    if not asked.client.may_use("refresh_token"):
        words = [word for word in words if word != "offline_access"]
    asked.scope = need(" ".join(words), f"scope {wanted!r}: nothing of it can be granted; the client "
                       f"registered for {asked.client.scope!r}", "invalid_scope")
    asked.request.note(f"scope: granted is {asked.scope!r} of {wanted!r} (RFC 6749 section 3.3)")
    why = functools.partial(why_dropped, asked.client)
    dropped = sorted({*wanted.split()} - {*words}, key=lambda word: (why(word), word))
    for reason, alike in itertools.groupby(dropped, why):
        asked.request.note(f"scope: dropped {' '.join(alike)}{reason}")


def check_prompt(asked: Authorization) -> None:
    """When the user signed in, and whether a page may be shown (OpenID Connect Core section 3.1.2.1): none
    is always refused, since every authorization here asks the user."""
    prompts, age = asked.fields.get("prompt").split(), asked.fields.get("max_age")
    need(not age or re.fullmatch(r"\d{1,9}", age), f"max_age is {age!r}; expected a number of seconds")
    if "login" in prompts:
        age = "0"
    if age:
        asked.signed_in_since = asked.portal.clock.now() - int(age)
    if "none" in prompts:
        need(len(prompts) == 1, "prompt: none stands alone")
        user = session_user(asked.portal, asked.request)
        need(user and user["started"] >= asked.signed_in_since, "prompt is none, but nobody is signed in",
             "login_required")
        raise PortalError("consent_required", "prompt is none, but every authorization here asks the user")


def check_launch(asked: Authorization) -> None:
    """The EHR's launch that the app answers (SMART, "Launch App: EHR Launch"), from now on this app's alone.
    A handle counts whatever the scope, as many bring one with launch/patient. Without a handle the scope
    launch is dropped, unless launch/patient is there too: that app can start either way."""
    handle, words, client_id = asked.fields.get("launch"), asked.scope.split(), asked.client.client_id
    if not handle:
        if "launch" in words and "launch/patient" not in words:
            words.remove("launch")
            asked.request.note("scope: dropped launch: no launch came with it")
        asked.scope = need(" ".join(words), "launch is missing: the scope launch is for an app that the EHR "
                           "launched; one that starts by itself asks for launch/patient")
        return
    with asked.portal.state.transaction() as database:
        bound = database.execute("UPDATE launches SET client_id = ? WHERE launch = ? AND expires > ? "
                                 "AND (client_id IS NULL OR client_id = ?)",
                                 (client_id, handle, asked.portal.clock.now(), client_id))
        need(bound.rowcount, "launch: this handle is unknown, expired, used before, or for another app")
        row = database.execute("SELECT * FROM launches WHERE launch = ?", (handle,)).fetchone()
    asked.launch = {"handle": handle, "username": row["username"], "patient_id": row["patient_id"],
                    "context": json.loads(row["context"])}
    asked.request.note(f"launch {shorten(handle)}: of {row['patient_id']}, for {row['username'] or 'any'}")


# In the order that safety needs. Until the first three have passed, nobody knows where a redirect would lead.
# Then check_audience: an error that travels may say who answers (iss). Only the last writes a table.
# Where everybody may register, a link here with an error leads to a page of anybody's choice, by way of a
# trusted host. RFC 9700 section 4.11.2 would ask the user first; S4S's scripts expect to be redirected.
PAGE_CHECKS = (check_lengths, check_client, check_redirect_uri)
REDIRECT_CHECKS = (check_audience, check_state, check_response_type, check_pkce, check_scope, check_prompt,
                   check_launch)


def back_to_app(portal: Portal, redirect_uri: str, state: str, issuer: str, **parameters: str) -> str:
    """The app's redirect URI with an answer: `state` as it came; with --strict `iss`, to say who answers (RFC
    9207). Else not: an EHR's launch brings iss too, and an app with one page for both would mix them up."""
    added = {"state": state, "iss": issuer if portal.settings.strict else ""}
    return with_query(redirect_uri, **parameters, **{name: value for name, value in added.items() if value})


# ######################################################################## 9 consent, and the code


@route("GET,POST /oauth/consent", "RFC 6749 section 4.1.1, S4S", kind="page")
def consent(portal: Portal, request: Request) -> Response:
    """The user's part: whose record, what of it, until when, yes or no."""
    posted = request.method == "POST"
    fields = guarded_form(portal, request) if posted else Fields(request.pairs())
    request_id = fields.get("request")
    decision = fields.get("decision") if posted else ""  # a link can't decide
    client, details = pending_request(portal, request_id)
    request.client_id = client.client_id
    # A stranger may ask under a Host of their own, to which the code goes, and bring the answer from here.
    need(details.get("asked_at") == portal.browser_base(request), "The app asked for this under another "
         "address of this server. Go back to it and start again.", kind=PageError)
    user = session_user(portal, request)
    if not user or user["started"] < details["signed_in_since"]:
        return to_sign_in(portal, request, f"/oauth/consent?request={request_id}",
                          details["launch"].get("username") or details["login_hint"])
    if decision == "deny":
        return redirect(decide(portal, request_id, None))
    patient_id = whose_record(portal, user["username"], details, fields.get("patient_id"))
    if patient_id == TO_CHOOSE:
        text = fields.get("q")
        patients = portal.patients_of(user["username"], text)
        return picker_page(portal, request, user, client, request_id, patients, text)
    if decision != "approve":
        if posted:  # the page comes by GET: the browser's Back and Reload send no form again
            here = portal.browser_base(request) + "/oauth/consent"
            return redirect(with_query(here, request=request_id, patient_id=patient_id or ""))
        return consent_page(portal, request, user, client, details, request_id, patient_id)
    labels = [value for name, value in request.form() if name == "security_labels"]  # a box each
    try:
        grant = new_grant(portal, client, user["username"], patient_id, details, labels,
                          fields.get("approval_expires"), fields.get("encounter_id"), user["started"])
    except PageError as error:
        return consent_page(portal, request, user, client, details, request_id, patient_id, error)
    return redirect(decide(portal, request_id, grant))


def pending_request(portal: Portal, request_id: str) -> tuple[Client, Json]:
    """A remembered authorization request: its client and its details."""
    row = portal.state.row("SELECT * FROM pending WHERE request_id = ? AND expires > ?",
                           request_id, portal.clock.now())
    client = portal.client(row["client_id"]) if row else None
    if not row or not client:
        raise PageError("invalid_request", "This request is not open any more: it was answered, or waited "
                        "too long. Go back to the app and start again.")
    return client, json.loads(row["details"])


TO_CHOOSE = ""  # in place of a patient's id: there are several, and the user has chosen none yet


def whose_record(portal: Portal, username: str, details: Json, chosen: str) -> str | None:
    """The patient of an authorization: the launch's, the one chosen, or the only one there is. TO_CHOOSE
    while there is a choice to make; None where the scope is about no patient's record and the user has none.
    PageError for a record that this user may not open, and for a user whom the launch is not for: a launch
    handle signs nobody in, since whoever sees the link has it."""
    wanted, fixed = details["launch"].get("username"), details["launch"].get("patient_id")
    need(wanted in (None, username), f"This launch is for the user {wanted}, and {username} is signed in. "
         "Sign out, then launch the app again.", "forbidden", 403, PageError)
    need(not fixed or chosen in (TO_CHOOSE, fixed),
         f"This launch is for the record {fixed}, not for {chosen}.", kind=PageError)
    patient_id: str | None = fixed or chosen or only_record(portal, username, needs_patient(details["scope"]))
    if patient_id:
        # patient_name knows only the records that this user may open
        need(portal.patient_name(username, patient_id) is not None,
             f"{username} may not open the record {patient_id!r}.", "forbidden", 403, PageError)
        need(not portal.records.lacks_patient(patient_id),
             f"The FHIR server behind this portal has no Patient/{patient_id}.", "not_found", 404, PageError)
    return patient_id


def only_record(portal: Portal, username: str, needed: bool) -> str | None:
    """The record of a user who has only one; TO_CHOOSE if one is needed that only the user can name.
    Where none is needed, the first (not a clinician's): S4S's apps expect a patient in every answer."""
    user = portal.user(username)
    patients = [] if user and user["any_patient"] else list(portal.patients_of(username))
    if needed and len(patients) != 1:
        return TO_CHOOSE
    return patients[0] if patients else None


def new_grant(portal: Portal, client: Client, username: str, patient: str | None, details: Json,
              labels: Sequence[str], until: str, encounter_id: str, signed_in: float) -> Json:
    """A grant for `whose_record`'s patient, by the columns of its row: the scope asked for, less what was
    unchecked; else PageError."""
    approved = approved_categories(offered_categories(portal, client, details["scope"]), client, labels)
    expires = end_of_approval(until, portal.clock.now())
    context = context_with_visit(portal, patient, details, encounter_id)
    return {"client_id": client.client_id, "username": username, "patient_id": patient,
            "scope": chosen_scope(portal, details["scope"], approved), "approval_expires": expires,
            "security_labels": json.dumps(approved), "issuer": details["issuer"],
            "redirect_uri": details["redirect_uri"], "code_challenge": details["code_challenge"],
            "nonce": details["nonce"], "signed_in": signed_in, "context": json.dumps(context)}


def offered_categories(portal: Portal, client: Client, scope: str) -> list[str]:
    """The categories that a scope reaches; a client's security_labels narrow them."""
    wanted = present_names(client.metadata.get("security_labels")) or CATEGORIES
    return [label for label, scopes in scopes_by_category(scope).items() if scopes and label in wanted]


def present_names(labels: Sequence[str] | None) -> list[str]:
    """Categories in the names that they have now."""
    return [OLD_CATEGORIES.get(label, label) for label in labels or []]


def approved_categories(offered: Sequence[str], client: Client, checked: Sequence[str]) -> list[str]:
    """The categories that the user left checked; the client's own, if none was offered."""
    approved = present_names(checked)
    for label in approved:
        need(label in offered, f"security_labels: {label!r} is no category offered here", kind=PageError)
    need(approved or not offered, "security_labels: check at least one, or do not approve.", kind=PageError)
    # A client whose security_labels leave nothing to offer must not get all: an empty list is no limit.
    return approved or present_names(client.metadata.get("security_labels"))


def context_with_visit(portal: Portal, patient: str | None, details: Json, encounter_id: str) -> Json:
    """The launch's context; if the app asked, with a visit: the launch's, the one chosen or the newest."""
    context = dict(details["launch"].get("context", {}))
    if not patient or "encounter" in context or "launch/encounter" not in details["scope"].split():
        need(encounter_id in ("", context.get("encounter")),
             "The app did not ask for a visit (launch/encounter), or it is chosen already.", kind=PageError)
        return context
    visits = encounters_of(portal, patient)
    need(not encounter_id or encounter_id in visits, f"{encounter_id!r} is not a visit of this patient.",
         kind=PageError)
    if visits:
        context["encounter"] = encounter_id or next(iter(visits))
    return context


def encounters_of(portal: Portal, patient_id: str) -> dict[str, str]:
    """A patient's visits, id -> in words, the newest first."""
    visits = sorted(portal.records.visits(patient_id), reverse=True,
                    key=lambda visit: str(elements(visit, "period.start")))
    return {visit["id"]: " ".join(map(str, elements(visit, "period.start", "type.text")[:2]))
            for visit in visits}


def end_of_approval(until: str, now: float) -> float:
    """The moment an approval until this day ends: the day's end. From today to two years from now."""
    try:
        expires = end_of_day(until)
    except ValueError:
        raise PageError("invalid_request", f"approval_expires: {until!r} is no date such as {day_of(now)}.")
    need(now < expires <= end_of_day(day_of(now, 2)),
         f"approval_expires: {until} is not from today to two years from now.", kind=PageError)
    return expires


def end_of_day(date: str) -> float:
    """The last second of a day, UTC; ValueError for what is no date."""
    day = datetime.date.fromisoformat(date if re.fullmatch("[0-9-]{10}", date) else "")  # not 2024-W01-1
    return calendar.timegm(day.timetuple()) + DAY - 1.0


def day_of(seconds: float, years: int = 0) -> str:
    """A Unix time's day, UTC, or the same day some years later."""
    day = moment(seconds).date()
    if (day.month, day.day) == (2, 29) and not calendar.isleap(day.year + years):
        day = day.replace(day=28)
    return day.replace(year=day.year + years).isoformat()


def decide(portal: Portal, request_id: str, grant: Json | None) -> str:
    """Close a pending request and use up its launch: a code for the grant, or access_denied. Gives where the
    browser goes."""
    details = pending_request(portal, request_id)[1]
    code, now, handle = secrets.token_urlsafe(24), portal.clock.now(), details["launch"].get("handle")
    answer = {"error": "access_denied", "error_description": "the user did not approve"}
    with portal.state.transaction() as database:
        closed = database.execute("DELETE FROM pending WHERE request_id = ?", (request_id,)).rowcount
        need(closed, "This request was answered already.", kind=PageError)  # a double click
        used = handle and database.execute("DELETE FROM launches WHERE launch = ?", (handle,)).rowcount
        if grant:
            need(used or not handle, "This launch was used already. Launch the app again.", kind=PageError)
            row = store_grant(database, grant, now)
            forget_expired(database, "tokens", now, "kind = 'code' AND NOT spent")
            database.execute("INSERT INTO tokens VALUES (?, 'code', ?, ?, ?, ?, 0, NULL)",
                             (code, row["grant_id"], row["scope"], now, now + CODE_SECONDS))
            answer = {"code": code}
    return back_to_app(portal, details["redirect_uri"], details["state"], details["issuer"], **answer)


def store_grant(database: sqlite3.Connection, grant: Json, now: float) -> Row:
    """Write a grant down, by those of its columns that are known; gives its row."""
    columns = {"grant_id": new_token(), "security_labels": "[]", **grant, "approved": now}
    if not database.execute("SELECT 1 FROM clients WHERE client_id = ?", (grant["client_id"],)).fetchone():
        raise invalid_client("this client is gone: everything was reset meanwhile")
    database.execute(f"INSERT INTO grants ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                     tuple(columns.values()))
    sql = "SELECT * FROM grants WHERE grant_id = ?"
    row: Row = database.execute(sql, (columns["grant_id"],)).fetchone()
    return row


@route("POST /revoke/{}", "S4S", kind="page")
def stop_sharing(portal: Portal, request: Request) -> Response:
    """End every authorization that this user gave one app for one patient; another user's is not found."""
    user = session_user(portal, request)
    if not user:
        return to_sign_in(portal, request, "/apps")  # the browser comes back by GET, and this is for POST
    guarded_form(portal, request)
    row = portal.state.row("SELECT * FROM grants WHERE grant_id = ? AND username = ?",
                           request.rest, user["username"])
    grant = need(row, "You gave no such permission.", "not_found", 404, PageError)
    with portal.state.transaction() as database:
        database.execute("UPDATE grants SET ended = 1 WHERE username = ? AND client_id = ? "
                         "AND patient_id IS ?", (user["username"], grant["client_id"], grant["patient_id"]))
    return redirect(portal.browser_base(request) + "/apps")


# ######################################################################## 10 tokens

# A token with all that is known of its grant. live: neither spent nor ended; it may have expired.
TOKEN_SQL = """SELECT tokens.token, tokens.kind, tokens.scope AS token_scope, tokens.issued, tokens.expires,
    tokens.spent, tokens.refresh_token, NOT tokens.spent AND NOT grants.ended AS live, grants.*
    FROM tokens JOIN grants USING (grant_id) WHERE token = ?"""


@route("POST /oauth/token", "RFC 6749 section 3.2", cors=True, fault="token")
def token_endpoint(portal: Portal, request: Request) -> Response:
    """Tokens for a code, for a refresh token, or for a backend service (RFC 6749 section 3.2)."""
    answers = {"authorization_code": exchange_code, "refresh_token": refresh,
               "client_credentials": backend_token}
    form = Fields(request.form())
    need(not form.repeated, f"{', '.join(form.repeated)}: given more than once")
    kind = form.need("grant_type")
    need(kind in answers, f"grant_type {kind!r}: expected {', '.join(answers)}", "unsupported_grant_type")
    named = request.headers.get("authorization") or form.get("client_id") or form.get("client_assertion")
    if kind == "refresh_token" and not named:
        # A public client's refresh may leave client_id out: the token names it. Another must prove itself,
        # and until then is not told whether there is such a token.
        row = portal.state.row(TOKEN_SQL, form.get("refresh_token"))
        owner = portal.client(row["client_id"]) if row and row["kind"] == "refresh" else None
        if owner and owner.auth_method == "none":
            form.values["client_id"] = owner.client_id
    client = authenticate_client(portal, request, form)
    need(client.may_use(kind), f"{client.client_id!r} did not register for {kind}", "unauthorized_client")
    return json_response(answers[kind](portal, request, client, form))


def exchange_code(portal: Portal, request: Request, client: Client, form: Fields) -> Json:
    """authorization_code (RFC 6749 section 4.1.3): tokens for a code that its own app brings."""
    code, redirect_uri, verifier = form.need("code"), form.get("redirect_uri"), form.get("code_verifier")
    with spending(portal, client, "code", code) as (database, row):
        check_code(row, redirect_uri, verifier)
        offline = "offline_access" in row["scope"].split()
        answer = issue_tokens(portal, database, row, row["scope"], portal.clock.now(), offline)
    proof = "verifier" if verifier else "no PKCE"
    request.note(f"code {shorten(code)}: client, redirect_uri, {proof}, time, once (RFC 6749 section 4.1.3)")
    if "openid" in answer["scope"].split():
        # It takes milliseconds: after the transaction, so that nobody waits for the database.
        answer["id_token"] = id_token(portal, row, answer["access_token"])
    return answer


@contextlib.contextmanager
def spending(portal: Portal, client: Client, kind: str,
             value: str) -> Iterator[tuple[sqlite3.Connection, Row]]:
    """Use up a code or a refresh token, once. The block judges its row and issues what it buys; if it raises,
    nothing is consumed. All is one transaction: of several at once, one wins. A second use means that two
    hold it, one a thief: the whole authorization ends (RFC 6749 section 4.1.2, RFC 9700 section 4.14.2)."""
    name = {"code": "code", "refresh": "refresh_token"}[kind]
    with portal.state.transaction() as database:
        row = database.execute(TOKEN_SQL, (value,)).fetchone()
        # It is good in its own client's hands alone (RFC 6749 sections 4.1.3 and 6).
        ours = row and row["kind"] == kind and row["client_id"] == client.client_id
        need(ours, f"this {name} was not issued to this client", "invalid_grant")
        if row["spent"]:  # never gets to the yield: refused below
            database.execute("UPDATE grants SET ended = 1 WHERE grant_id = ?", (row["grant_id"],))
        else:
            need(not row["ended"], f"this {name} was revoked", "invalid_grant")
            need(row["expires"] > portal.clock.now(), f"this {name} has expired", "invalid_grant")
            yield database, row
            database.execute("UPDATE tokens SET spent = 1 WHERE token = ?", (value,))
    # After the transaction: raised within, it would undo the end of the grant.
    need(not row["spent"], f"this {name} was used before; the whole authorization has ended", "invalid_grant")


def check_code(row: Row, redirect_uri: str, verifier: str) -> None:
    """Whether a code comes from the app that asked for it: the same redirect URI (RFC 6749 section 4.1.3),
    and the verifier of its challenge (RFC 7636 section 4.6)."""
    need(redirect_uri == row["redirect_uri"],
         f"redirect_uri {redirect_uri!r} is not the one of the authorization request", "invalid_grant")
    if not row["code_challenge"]:
        need(not verifier, "code_verifier is given, but the request had no code_challenge", "invalid_grant")
        return
    need(re.fullmatch(r"[A-Za-z0-9._~-]{43,128}", verifier),
         "code_verifier: expected 43 to 128 unreserved characters", "invalid_grant")
    need(same_secret(s256_challenge(verifier), row["code_challenge"]),
         "code_verifier does not match the code_challenge", "invalid_grant")


def issue_tokens(portal: Portal, database: sqlite3.Connection, grant: Row, scope: str, now: float,
                 offline: bool, lifetime: float | None = None) -> Json:
    """An access token for the scope, in an answer of RFC 6749 section 5.1; with a refresh token for all that
    was granted, if `offline`. That one lasts as long as the approval; no access token outlives it."""
    insert, grant_id = "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, 0, ?)", grant["grant_id"]
    access, end, refresh_token = new_token(), grant["approval_expires"], None
    said = grant["access_lifetime"] if lifetime is None else lifetime
    expires = min(now + (portal.settings.token_lifetime if said is None else said), end)
    answer = {"access_token": access, "token_type": "Bearer", "expires_in": max(0, int(expires - now)),
              "scope": scope, **launch_context(grant)}
    if offline:
        refresh_token = answer["refresh_token"] = new_token()
        database.execute(insert, (refresh_token, "refresh", grant_id, grant["scope"], now, end, None))
    database.execute(insert, (access, "access", grant_id, scope, now, expires, refresh_token))
    return answer


def launch_context(grant: Row) -> Json:
    """What is open, as a token response says it (SMART, "Launch context arrives with your access_token")."""
    context: Json = {"patient": grant["patient_id"]} if grant["patient_id"] else {}
    if grant["context"] != "{}":
        context.update(json.loads(grant["context"]))
    if "need_patient_banner" in context:  # of an EHR launch: the app is to look as if it belonged to us
        context["smart_style_url"] = f"{grant['issuer']}/smart-style/{LOOK_DIGEST}"
    return context


def refresh(portal: Portal, request: Request, client: Client, form: Fields) -> Json:
    """refresh_token (RFC 6749 section 6): a new access token, and a new refresh token for the used one. A
    narrower scope is the new access token's alone; the refresh token keeps what was granted."""
    value, wanted = form.need("refresh_token"), form.get("scope")
    need(not wanted or SCOPE_SYNTAX.fullmatch(wanted), f"scope: expected {SCOPE_WORDS}", "invalid_scope")
    # Before the transaction, in which nobody is to wait for a FHIR server that tells its version.
    served = {word: served_scope(portal, word, word) for word in wanted.split()}
    with spending(portal, client, "refresh", value) as (database, row):
        # What was not granted is refused (RFC 6749 section 6). But apps send their first scope again at each
        # refresh: of a word that was granted in part they get this part.
        granted = {word: negotiate_scope(word, row["scope"]) for word in served}
        for word, some in granted.items():
            need(served[word] and some,
                 f"scope: {word!r} was not granted; granted is {row['scope']!r}", "invalid_scope")
        scope = " ".join(dict.fromkeys(granted.values())) or row["scope"]
        answer = issue_tokens(portal, database, row, scope, portal.clock.now(), True)
    request.note("refresh token rotated: the old one, used again, ends all (RFC 9700 section 4.14.2)")
    return answer


@route("POST /oauth/introspect", "RFC 7662 section 2", cors=True, fault="introspect")
def introspect(portal: Portal, request: Request) -> Response:
    """What a token is good for (RFC 7662)."""
    form = Fields(request.form())
    now, row = portal.clock.now(), known_token(portal, form.need("token"))
    check_asker(portal, request, form, row)
    if not row or not is_active(row, now):
        return json_response({"active": False})  # and nothing else (RFC 7662 section 2.2)
    answer = {"active": True, "scope": row["token_scope"], "client_id": row["client_id"],
              "exp": int(row["expires"]), "iat": int(row["issued"]), "iss": row["issuer"],
              **launch_context(row)}
    if row["kind"] == "access":
        answer["token_type"] = "Bearer"
    if row["username"]:
        answer.update(username=row["username"], **claims_of(portal, row))
    return json_response(answer)


def check_asker(portal: Portal, request: Request, form: Fields, row: Row | None) -> None:
    """Introspection answers a client that proves who it is (a public one can't), or the bearer of a backend
    service's token or one of the same authorization (RFC 7662 section 2.1: against scanning)."""
    expected = "expected a valid bearer token, for system/ scopes or of the authorization asked about"
    if bearer_value(request) is None:
        if authenticate_client(portal, request, form).auth_method == "none":
            raise invalid_client(f"a public client proves nothing by its id: {expected}")
        return
    asker = bearer(portal, request, error="invalid_client")
    service, same_grant = asker["username"] is None, row and row["grant_id"] == asker["grant_id"]
    if not service and not same_grant:
        raise PortalError("invalid_client", expected, 401, [challenge(error="invalid_token")])


def bearer(portal: Portal, request: Request, posted: str = "", error: str = "invalid_token") -> Row:
    """The access token of a request, or the one `posted` in its form (RFC 6750 section 2.2); else PortalError
    401. Who sends none is told only to send one: an error code is for those that tried (section 3.1)."""
    value = posted or bearer_value(request)
    if value is None:
        raise PortalError("invalid_token", "no token: send Authorization: Bearer ...", 401, [challenge()])
    now, row = portal.clock.now(), known_token(portal, value)
    if not row or row["kind"] != "access" or not is_active(row, now):
        timed_out = row and row["kind"] == "access" and row["live"]
        why = f"the access token {'has expired' if timed_out else 'is not a valid one'}"
        told = challenge(error="invalid_token", error_description=why)
        raise PortalError(error, why, 401, [told])
    request.client_id, request.username = row["client_id"], row["username"]
    request.note(f"access token {shorten(row['token'])}: patient {row['patient_id']}, scope "
                 f"{row['token_scope']} (RFC 6750 section 2.1)")
    return row


def bearer_value(request: Request) -> str | None:
    """The value of Authorization: Bearer (RFC 6750 section 2.1); None without such a header."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else None


def known_token(portal: Portal, value: str) -> Row | None:
    """An access or refresh token's row, whatever its state; None for what was never one."""
    row = portal.state.row(TOKEN_SQL, value)
    return row if row and row["kind"] != "code" else None


def is_active(row: Row, now: float) -> bool:
    """Whether a token is good. `now` is of before its row was looked up: a reset after that sets the clock
    back, and what has expired stays expired."""
    return bool(row["live"]) and row["expires"] > now


@route("POST /oauth/revoke", "RFC 7009 section 2", cors=True, fault="revoke")
def revoke(portal: Portal, request: Request) -> Response:
    """End a token; a refresh token's end is the authorization's. 200 whatever it was (RFC 7009 section 2.2):
    an error for another client's token, which stays (section 2.1), would tell a thief that it is good."""
    form = Fields(request.form())
    value = form.need("token")
    client = authenticate_client(portal, request, form)
    row = known_token(portal, value)
    if row and row["client_id"] == client.client_id:
        with portal.state.transaction() as database:
            if row["kind"] == "refresh":
                database.execute("UPDATE grants SET ended = 1 WHERE grant_id = ?", (row["grant_id"],))
            else:
                database.execute("UPDATE tokens SET spent = 1 WHERE token = ?", (value,))
    return json_response({})


# ######################################################################## 11 the record's boundary

# Of the records kept here (section 18) as of another server's (section 19), an app sees what `Access.may_see`
# lets through: one judge, asked for every single resource. Searches are narrowed before, so that few have to
# be thrown away; that is for speed, and nothing relies on it. What it writes passes `judge_write` before.


@route("GET,POST,PUT,PATCH,DELETE /api/fhir/{}", "FHIR RESTful API, RFC 6750", cors=True, kind="fhir",
       fault="fhir")
def fhir(portal: Portal, request: Request) -> Response:
    """The record of the patient that the access token is for, and nothing else. PATCH, DELETE: refused."""
    if request.rest.startswith(".well-known/"):  # some libraries look for OpenID's document here
        raise FhirError("not-found", f"{request.path}: expected .well-known/smart-configuration", 404)
    row = bearer(portal, request)
    base = portal.base(request) + "/api/fhir"
    return answer_fhir(portal.records, fhir_request(request, access_of(portal, row), base, row["grant_id"]))


@route("GET,POST /api/open-fhir/{}", "FHIR RESTful API, S4S", cors=True, kind="fhir", fault="open_fhir")
def open_fhir(portal: Portal, request: Request) -> Response:
    """All records, without a token: to see what there is."""
    need(portal.settings.serves_open_fhir, "open FHIR is off; see --open-fhir", "not-found", 404, FhirError)
    reads = request.method != "POST" or interaction_of("POST", request.rest)[0] in ("search", "everything")
    need(reads, "POST: only [type]/_search and Patient/[id]/$everything", "not-supported", 405, FhirError,
         [("Allow", "GET, HEAD")])
    if request.rest == "metadata":
        statement = capability_statement(portal, request, False)
        return fhir_response(request, statement, version=portal.records.version)
    base = portal.base(request) + "/api/open-fhir"
    return answer_fhir(portal.records, fhir_request(request, OPEN_ACCESS, base, ""))


class FhirRequest(NamedTuple):
    """A request of the FHIR API, understood: who asks, and for what."""
    request: Request
    access: Access
    base: str              # what this server's own absolute references begin with
    grant_id: str          # "" without a token
    interaction: str       # read, search, everything, create or update
    type: str
    id: str = ""
    version: str = ""      # of the resource, where an older one may be meant
    compartment: str = ""  # the patient whose resources are searched, where the path says so

    @property
    def path(self) -> str:
        """The path below the base, without /_search."""
        return self.request.rest.removesuffix("/_search")


# The shapes that a path may have. Each part is decoded alone, and other characters fit none: what hides in
# dots, slashes or semicolons, encoded once or twice, ends here. An id is what FHIR says, less . and .. (up).
_TYPE, _ID = "[A-Z][A-Za-z]{1,63}", r"(?!\.{1,2}(?:/|$))[A-Za-z0-9.-]{1,64}"
FHIR_ID = re.compile(_ID)
PATH_SHAPES = [(method, interaction, re.compile(shape)) for method, interaction, shape in (
    ("GET", "search", rf"(?P<type>{_TYPE})"), ("POST", "search", rf"(?P<type>{_TYPE})/_search"),
    ("GET", "read", rf"(?P<type>{_TYPE})/(?P<id>{_ID})(?:/_history/(?P<version>{_ID}))?"),
    *((method, "everything", rf"(?P<type>Patient)/(?P<id>{_ID})/\$everything") for method in ("GET", "POST")),
    ("GET", "search", rf"Patient/(?P<compartment>{_ID})/(?P<type>{_TYPE})"),
    ("POST", "create", rf"(?P<type>{_TYPE})"), ("PUT", "update", rf"(?P<type>{_TYPE})/(?P<id>{_ID})"))]
POSSIBLE = ("possible are GET of [type], [type]/[id], [type]/[id]/_history/[id] and Patient/[id]/[type], "
            "POST of [type]/_search, and both of Patient/[id]/$everything; to write, POST of [type] and PUT "
            "of [type]/[id], of one resource, on no condition but If-Match")


@remembered(20)
def interaction_of(asked_by: str, path: str) -> tuple[str, Mapping[str, str]]:
    """What a method and path below the base ask for, and the parts of the path by name; "" for nothing."""
    parts = [unquote(part) for part in path.split("/")]
    plain = "/".join(parts) if all(re.fullmatch("[A-Za-z0-9._$-]*", part) for part in parts) else "?"
    for method, interaction, shape in PATH_SHAPES:
        if method == asked_by and (match := shape.fullmatch(plain)):
            return interaction, match.groupdict(default="")
    return "", {}


def fhir_request(request: Request, access: Access, base: str, grant_id: str) -> FhirRequest:
    """What a request asks for, with its parameters; FhirError where that is nothing this server does."""
    method = "GET" if request.method == "HEAD" else request.method
    interaction, parts = interaction_of(method, request.rest)
    if not interaction:
        told = f"{request.method} {request.path}: {POSSIBLE}"
        harmless = method == "GET" and request.rest and "$" not in unquote(request.rest)
        permit(harmless, told)  # writing, or running something ($), is forbidden: 403; no such thing: 404
        raise FhirError("not-supported", told, 404)
    take_parameters(request, interaction)
    return FhirRequest(request, access, base, grant_id, interaction, **parts)


# What a scope must hold for each interaction.
LETTERS_OF = {"read": "r", "search": "s", "everything": "rs", "create": "c", "update": "u"}


def answer_fhir(records: Records, asked: FhirRequest) -> Response:
    """Answer an interaction that the scope allows at all; which resources then come is the judge's to say."""
    records.check_type(asked)
    for letter in LETTERS_OF[asked.interaction]:
        if not asked.access.allows(asked.type, letter, asked.id):
            raise ScopeError(*(f"{whose}/{asked.type}.{letter}" for whose in ("patient", "user", "system")))
        # Another patient is refused by the id alone, without a look: so it tells nothing of who is there.
        permit(asked.type != "Patient" or not asked.id or asked.access.reaches(asked.id, letter),
               f"Patient/{asked.id}: the token is not for this patient's record")
    if asked.interaction == "search":
        permit(asked.type != "Binary", "Binary: can't be searched for, only read", "not-supported")
    response = records.answer(asked)
    writes = asked.interaction in ("create", "update")
    if writes and "return=minimal" in asked.request.headers.get("prefer", ""):
        response.body = b""
    return response


def permit(good: object, description: str, error: str = "forbidden") -> None:
    """`need`, with FHIR's 403."""
    need(good, description, error, 403, FhirError)


def judge_write(records: Records, asked: FhirRequest, new: Resource, stored: Resource | None = None,
                tag: str = "") -> None:
    """THE JUDGE of writing: FhirError unless what a client sent, and what it replaces (`stored`, of the
    version `tag`), may both be written with this token, and are in one record. See `check_pointers` too."""
    access, sent = asked.access, f"the {asked.type} sent"
    if asked.interaction == "update":
        if not stored or not access.may_see(stored, "r" if access.allows(asked.type, "r") else "u"):
            raise not_in_record(asked)  # judged by u where the token reads nothing: 403 would say it is there
        permit(access.may_write(stored, "u"), f"{asked.path} may be read with this token, but not changed")
        permit(new.owner == stored.owner, f"{sent} is not in the record of the one before it")
        known = (asked.request.headers.get("if-match") or "*").replace("W/", "")  # FHIR's tags are weak
        need({"*", tag.replace("W/", "")}.intersection(map(str.strip, known.split(","))),
             f"If-Match is {known}: {asked.path} is of another version", "conflict", 412, FhirError)
    permit(stored or asked.type != "Patient", "a Patient can't be created here")
    # Only the log is told whose it is: an app could list ids in a Provenance and learn whose each is.
    asked.request.note(f"to be written: its patient is {new.owner!r}, its categories {new.categories()}")
    permit(access.may_write(new, LETTERS_OF[asked.interaction]),
           f"{sent} may not be written with this token: it, with all within it, must be of a patient, of a "
           "category and ?param=value that the scope reaches")
    # Whoever may open every record could else write for a patient who is not there.
    permit(stored or access.patients(asked.type, "c") is not ALL_PATIENTS
           or records.patient_name(new.owner) is not None, f"there is no Patient/{new.owner}")


def not_in_record(asked: FhirRequest) -> FhirError:
    """The one answer to a read of what is not there, was deleted, is another's (a Patient: see answer_fhir),
    or outside of the token's categories and ?param=value. Two would let an app count what is hidden."""
    return FhirError("not-found", f"there is no {asked.type}/{asked.id} among what may be read here", 404)


class Resource:
    """A resource as the judge sees it: what it is, whose, of which categories. Of one that a FHIR server sent
    its JSON says so; of one that lies in SQLite it was noted before (StoredResource)."""
    content: Json

    def __init__(self, content: Json, base: str = ""):
        self.content, self.base = content, base
        self.type, self.id = content.get("resourceType"), content.get("id")
        self.owner = owner(content, base)

    def categories(self) -> list[str]:
        """See `categories`."""
        return categories(self.content)

    def is_pointed_to(self, access: Access) -> bool:
        """Of a Binary: whether a document that may be seen points to it. Sections 18 and 19 say so."""
        return False


class Everybody(frozenset[Any]):
    """Whose records a scope without a bound opens. Not None: a forgotten value must not open everything. It
    holds a number, which no id is: it equals neither the empty set nor any patients (`access_for` remembers
    by equality)."""
    def __contains__(self, patient_id: object) -> bool:
        return True


EVERYBODY = Everybody([1])     # of system/ scopes: all there is, also of UNKNOWN owner
ALL_PATIENTS = Everybody([2])  # of a clinician's user/ scopes: only what belongs to a patient, or to nobody
NO_LIMIT: frozenset[str] = frozenset()  # of a token that was not narrowed to categories


class Access:
    """What one token lets its bearer see and write. All that a read or search gives passed `may_see`."""
    def __init__(self, scope: str, patient_id: str | None = None,
                 users_patients: frozenset[str] = frozenset(), labels: frozenset[str] = NO_LIMIT,
                 fhir_user: str = "", version: str = "r4", unlimited: bool = False):
        self.scope, self.scopes = scope, resource_scopes(scope)
        self.patient_id = patient_id          # whose record patient/ scopes open
        self.users_patients = users_patients  # whose records user/ scopes open
        self.labels = labels                  # the categories approved
        self.fhir_user = fhir_user            # Type/id that the token's fhirUser claim names
        self.version = version                # of FHIR, for what ?param=value means
        self.unlimited = unlimited            # no token: /api/open-fhir
        self._known: dict[tuple[str, str], list[tuple[frozenset[str], Any]]] = {}

    def may_see(self, resource: Resource, letters: str) -> bool:
        """THE JUDGE: whether this very resource may be seen, by owner, scope and category. In doubt, no.
        `letters` says how it is reached: r (read), s (search), or both for an operation that does both."""
        if self._opens(resource, letters):
            return True
        if self._is_user(resource.type, resource.id, letters):
            return resource.owner != UNKNOWN  # UNKNOWN if something contained names another
        return resource.type == "Binary" and letters == "r" and self._opens_file(resource)

    def may_write(self, resource: Resource, letter: str) -> bool:
        """Whether this very resource may be created (c), or stand before or after an update (u)."""
        # What is nobody's is only read, whomever it names.
        is_owned = resource.owner not in (NOBODY, UNKNOWN) and resource.type not in SHARED_TYPES
        return is_owned and not self.unlimited and self._opens(resource, letter)

    def _opens(self, resource: Resource, letters: str) -> bool:
        """Whether a scope reaches the owner, type and resource, and all its categories were approved."""
        for patients, constraints in self._openings(str(resource.type), letters):
            if resource.owner == UNKNOWN and patients is not EVERYBODY:
                continue
            if resource.owner != NOBODY:
                if resource.owner not in patients:
                    continue
                # A resource of two categories needs both: who left out laboratory results meant all of them.
                if self.labels and not self.labels.issuperset(resource.categories()):
                    return False
            # Each scope alone: the ?param=value of one go together, several scopes add up.
            if not constraints or resource_matches(resource.content, self.version, constraints):
                return True
        return False

    def _opens_file(self, binary: Resource) -> bool:
        """Whether a Binary that does not say whose it is may be read: what may be seen points to it."""
        # Pointers first: another's Binary and one that doesn't exist take the same time to refuse. A Binary
        # that names its patient, or holds resources, was judged by them: no pointer opens it.
        return (self.allows("Binary", "r") and binary.is_pointed_to(self)
                and "contained" not in binary.content
                and named_patients(binary.content, binary.base) <= {UNKNOWN})

    def allows(self, type_name: str, letter: str, resource_id: str = "") -> bool:
        """Whether the scope allows a letter (r, s, c, u) for this type at all; with an id, that very one: a
        token with openid and fhirUser may read its user's, whatever its patient and categories. By that word
        the user approved to be known (SMART, "Scopes for requesting identity data")."""
        return bool(self._openings(type_name, letter)) or self._is_user(type_name, resource_id, letter)

    def reaches(self, patient_id: str, letter: str) -> bool:
        """Whether this letter reaches the Patient of this id, if there is one."""
        return patient_id in self.patients("Patient", letter) or self._is_user("Patient", patient_id, letter)

    def _is_user(self, type_name: object, resource_id: object, letters: str) -> bool:
        """Whether this is a read of the resource that stands for the token's user."""
        return letters == "r" and f"{type_name}/{resource_id}" == self.fhir_user

    @property
    def narrowed(self) -> bool:
        """Whether categories or ?param=value leave something out: a Bundle.total would tell how much."""
        return bool(self.labels) or any(scope.constraints for scope in self.scopes)

    def patients(self, type_name: str, letter: str) -> frozenset[str]:
        """The patients whose resources of a type this letter reaches, or EVERYBODY or ALL_PATIENTS."""
        reaches = [reach for reach, _ in self._openings(type_name, letter)]
        for unbounded in (EVERYBODY, ALL_PATIENTS):
            if unbounded in reaches:
                return unbounded
        return frozenset().union(*reaches)

    def _openings(self, type_name: str, letters: str) -> list[tuple[frozenset[str], Any]]:
        """Of each scope that opens a type for these letters: the patients it reaches, its ?param=value."""
        if self.unlimited:
            return [(EVERYBODY, ())]
        known = self._known.get((type_name, letters))
        if known is None:
            reach = {"patient": frozenset([self.patient_id] if self.patient_id else []),
                     "user": self.users_patients, "system": EVERYBODY}
            if len(self._known) > 100:  # a FHIR server behind may name any type
                self._known.clear()
            known = self._known[type_name, letters] = list(dict.fromkeys(
                (reach[scope.context], scope.constraints) for scope in self.scopes
                if scope.type in ("*", type_name) and set(letters) <= set(scope.letters)))
        return known

    def binaries_in(self, documents: Iterable[Resource]) -> set[str]:
        """The ids of the Binaries to which those of the documents point that may be seen themselves."""
        return {binary_id for document in documents if document.type in DOCUMENT_TYPES
                and (self.may_see(document, "r") or self.may_see(document, "s"))
                for url in attachments(document.content)
                if (binary_id := _id_in(url, "Binary", document.base))}


OPEN_ACCESS = Access("", unlimited=True)  # what /api/open-fhir shows
access_for = remembered(40)(Access)  # one for all requests with equal rights: it remembers


def access_of(portal: Portal, row: Row) -> Access:
    """What an access token lets its bearer see."""
    scope, theirs = row["token_scope"], frozenset()  # type: str, frozenset[str]
    user = portal.user(row["username"]) if "user/" in scope else None
    if user:
        theirs = ALL_PATIENTS if user["any_patient"] else frozenset(portal.patients_of(user["username"]))
    labels = frozenset(json.loads(row["security_labels"])) if row["security_labels"] != "[]" else NO_LIMIT
    fhir_user = "/".join(claims_of(portal, row).get("fhirUser", "").split("/")[-2:])
    version = portal.records.version if "?" in scope else "r4"
    return access_for(scope, row["patient_id"], theirs, labels, fhir_user, version)


# The elements that say whose record a resource is in, as DSTU2, STU3 and R4 name them. FHIR's patient
# compartment is wider, but an Observation about Amy that her father performed is Amy's alone. A Provenance
# belongs to the patient of all its targets. Left out, and so refused, is what can't be told: AuditEvent is
# about accesses, Schedule and Slot point at doctors, Group and Person at several people; Bundle and
# Parameters hold resources, which no search or $everything should answer within its Bundle.
OWNER_ELEMENTS: dict[str, tuple[str, ...]] = {name: paths for paths, names in {
    (): "Patient",  # by its id
    ("patient",):
        "AllergyIntolerance BodySite BodyStructure Claim ClaimResponse Consent CoverageEligibilityRequest "
        "CoverageEligibilityResponse DetectedIssue Device EligibilityRequest EligibilityResponse "
        "EpisodeOfCare ExplanationOfBenefit FamilyMemberHistory ImagingManifest ImagingObjectSelection "
        "Immunization ImmunizationEvaluation ImmunizationRecommendation MedicationOrder MolecularSequence "
        "NutritionOrder RelatedPerson Sequence SupplyDelivery VisionPrescription",
    ("subject",):
        "Account AdverseEvent Basic CarePlan CareTeam ChargeItem Communication CommunicationRequest "
        "Composition DeviceRequest DeviceUseRequest DeviceUseStatement DiagnosticOrder DiagnosticReport "
        "DocumentManifest DocumentReference Flag Goal Invoice List Media MedicationRequest Observation Order "
        "Procedure ProcedureRequest QuestionnaireResponse RequestGroup RiskAssessment ServiceRequest "
        "Specimen",
    ("patient", "subject"):  # the first in DSTU2, and some in STU3
        "ClinicalImpression Condition Encounter ImagingStudy MeasureReport MedicationAdministration "
        "MedicationDispense MedicationStatement ReferralRequest",
    ("beneficiary",): "Coverage", ("for",): "Task", ("individual",): "ResearchSubject",
    ("actor",): "AppointmentResponse", ("participant",): "Appointment", ("securityContext",): "Binary",
    ("target",): "Provenance"}.items() for name in names.split()}
SHARED_TYPES = ("Practitioner", "PractitionerRole", "Organization", "Location", "Medication", "Substance",
                "Endpoint", "Questionnaire")
SERVED_TYPES = {"*", *SHARED_TYPES, *OWNER_ELEMENTS}  # in a scope
# These are believed in types that have no such element, too: whoever wrote it meant somebody.
OWNER_NAMES = frozenset(("patient", "subject", "beneficiary", "for", "individual"))
_NAMING = {name: (names, OWNER_NAMES.difference(names)) for name, names in (
    *OWNER_ELEMENTS.items(), *((name, ()) for name in SHARED_TYPES))}
NOBODY, UNKNOWN = "", "?"  # owners: of what belongs to nobody, of what can't be told; no ids that FHIR allows
_LOCAL = re.compile(rf"({_TYPE}/{_ID})(?:/_history/{_ID})?")
_NO_PATIENT = re.compile("(?:.*/)?(?:Practitioner(?:Role)?|Location|Device|HealthcareService)/[A-Za-z0-9.-]+")


def owner(resource: Json, base: str = "", owners: Mapping[str, str] = {}) -> str:
    """The id of the patient a resource belongs to; NOBODY if to none; UNKNOWN if that can't be told.

    The patients named in several elements or in contained resources must all be one: a record of two people
    may be shown to neither. References may be relative, or absolute below `base`, and to a version; those by
    identifier alone or into the resource itself (#) can't be told. `owners` are those of a Provenance's
    targets, by Type/id, as far as they are known. A reference to somebody else elsewhere in a resource is an
    id, not a record: it stays. So does Patient.link: to read the linked record takes a token for that one.
    """
    named = named_patients(resource, base, owners)
    if not named and resource.get("resourceType") in ("Device", *SHARED_TYPES):
        named = {NOBODY}
    for inner in as_list(resource.get("contained")):
        named |= patients_within(inner, base)
    return named.pop() if len(named) == 1 else UNKNOWN


def patients_within(inner: Any, base: str) -> set[str]:
    """The patients that a contained resource names: in its owner elements, else wherever it refers to one."""
    if not isinstance(inner, dict) or "contained" in inner or not isinstance(inner.get("resourceType"), str):
        return {UNKNOWN}
    named = set[str]()
    if inner["resourceType"] in OWNER_ELEMENTS and inner["resourceType"] != "Provenance":
        named = named_patients(inner, base)
    for value in () if named else values_within(list(inner.values())):
        if isinstance(value, dict):
            reference = reference_of(value)
            if "patient/" in reference.lower() or (not reference and value.get("type") == "Patient"):
                named.add(_id_in(reference, "Patient", base) or UNKNOWN)
            if "resourceType" in value:
                named.add(UNKNOWN)
    return named


def values_within(value: Any) -> Iterator[Any]:
    """A JSON value and all within it."""
    values = [value]
    for inner in values:  # which grows by what is in them
        yield inner
        values += inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()


def named_patients(resource: Json, base: str, owners: Mapping[str, str] = {}) -> set[str]:
    """The patients in a resource's owner elements; UNKNOWN among them stands for what can't be told."""
    type_name = resource.get("resourceType")
    if not isinstance(type_name, str) or type_name not in _NAMING:
        return {UNKNOWN}
    names, others = _NAMING[type_name]
    values = [value for name in names for value in as_list(resource.get(name))]
    if type_name == "Appointment":  # doctors and rooms take part too
        values = [person.get("actor") if isinstance(person, dict) else None for person in values]
        values = [actor for actor in values if not _NO_PATIENT.fullmatch(reference_of(actor))]
    if not others.isdisjoint(resource):
        values += [value for name in others for value in as_list(resource.get(name))]
    texts = [reference_of(value) for value in values]
    named = {_id_in(text, "Patient", base) or owners.get(local_name(text, base), UNKNOWN) for text in texts}
    if type_name == "Patient":
        named.add(id_of(resource) or UNKNOWN)
    named.discard(NOBODY)  # among the targets of a Provenance, what is nobody's says nothing
    return named


@remembered(4)  # the same few stand in every resource of a record
def local_name(reference: str, base: str) -> str:
    """The Type/id that a reference names, relative or below `base`; "" for any other."""
    if base and reference.startswith(base + "/"):
        reference = reference[len(base) + 1:]
    match = _LOCAL.fullmatch(reference)
    return match[1] if match else ""


def _id_in(reference: str, type_name: str, base: str) -> str | None:
    """The id in a reference to a resource of a type, relative or below `base`; None for any other."""
    name, _, key = local_name(reference, base).partition("/")
    return key if name == type_name else None


# The categories of the consent page, in its order: what it is called there, and the types it covers.
CATEGORIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "patient": ("Name, address and other demographics", ("Patient",)),
    "medications": ("Medications", ("MedicationOrder", "MedicationRequest", "MedicationStatement",
                                    "MedicationDispense", "MedicationAdministration")),
    "allergies": ("Allergies", ("AllergyIntolerance",)),
    "immunizations": ("Immunizations", ("Immunization",)),
    "problems": ("Problems and diagnoses", ("Condition",)),
    "procedures": ("Procedures", ("Procedure",)),
    "vital-signs": ("Vital signs", ("Observation",)),
    "laboratory": ("Laboratory results", ("Observation", "DiagnosticReport")),
    "smoking": ("Smoking and social history", ("Observation",)),
    "documents": ("Documents", ("DocumentReference", "Binary")),
    "coverage": ("Insurance coverage", ("Coverage",)),
    "explanation-of-benefit": ("Insurance payments", ("ExplanationOfBenefit",)),
    "imaging": ("Imaging studies", ("ImagingStudy",)),
    "encounters": ("Visits", ("Encounter",))}
_BY_CONTENT = ("Observation", "DiagnosticReport")  # whose own category decides
# A category of Observations, as HL7's code for it; smoking status also goes by what was observed.
OBSERVATION_CODES = {"vital-signs": "vital-signs", "laboratory": "laboratory", "smoking": "social-history"}
SMOKING_STATUS = ("http://loinc.org", "72166-2")
_LABEL_OF_TYPE = {name: label for label, (_, types) in CATEGORIES.items() for name in types
                  if name not in _BY_CONTENT}
CATEGORIES["other"] = "Everything else", tuple(name for name in OWNER_ELEMENTS if name not in _LABEL_OF_TYPE)
OLD_CATEGORIES = {"allergy": "allergies"}
# The laboratory's sections in HL7's table 0074, which US laboratories send as category: blood gases and bank,
# cytogenetics, chemistry, cytopathology, genetics, hematology, immunology, microbiology ...
_LABORATORY = ("BG", "BLB", "CG", "CH", "CP", "GE", "HM", "IMM", "LAB", "MB", "MCB", "MYC", "OSL", "PAR",
               "PAT", "SP", "SR", "TX", "VR")


def categories(resource: Json) -> list[str]:
    """The categories a resource falls into, if it is somebody's; what it contains adds none."""
    type_name = resource.get("resourceType")
    if type_name not in _BY_CONTENT:
        return [_LABEL_OF_TYPE.get(str(type_name), "other")]
    tokens = tokens_of(elements(resource, "category"))
    codes = {"laboratory" if code == "LAB" or (code in _LABORATORY and system.endswith("0074")) else code
             for system, code in tokens}
    if type_name == "DiagnosticReport":
        return ["laboratory"] if "laboratory" in codes else ["other"]
    labels = [label for label, code in OBSERVATION_CODES.items() if code in codes]
    if "smoking" not in labels and SMOKING_STATUS in tokens_of(elements(resource, "code")):
        labels.append("smoking")
    return labels or ["other"]


# ######################################################################## 12 discovery


# RFC 8414 section 3.1 puts the path of a base URL after /.well-known/oauth-authorization-server. Such a
# request never reaches a server below the path: the reverse proxy must send it here.
@route("GET /.well-known/openid-configuration", "OpenID Connect Discovery section 4", True, fault="discovery")
@route("GET /.well-known/oauth-authorization-server", "RFC 8414 section 3", True, fault="discovery")
def oauth_configuration(portal: Portal, request: Request) -> Response:
    """Where the endpoints are and what they can do, for OAuth and OpenID Connect clients."""
    return json_response(server_metadata(portal, request))


@route("GET /api/fhir/.well-known/smart-configuration", "SMART, Conformance", cors=True, fault="discovery")
def smart_configuration(portal: Portal, request: Request) -> Response:
    """The same for SMART apps, at the FHIR base, with what this server can do (SMART, "Conformance")."""
    # Two lists are shorter: SMART has words for refresh tokens and public clients in `capabilities` alone.
    document = server_metadata(portal, request)
    document["grant_types_supported"].remove("refresh_token")
    document["token_endpoint_auth_methods_supported"].remove("none")
    return json_response({**document, "capabilities": [  # each is a promise
        "launch-ehr", "launch-standalone", "authorize-post", "client-public", "client-confidential-symmetric",
        "client-confidential-asymmetric", "sso-openid-connect", "context-banner", "context-style",
        "context-ehr-patient", "context-ehr-encounter", "context-standalone-patient",
        "context-standalone-encounter", "permission-offline", "permission-patient", "permission-user",
        "permission-v1", "permission-v2"]})


def server_metadata(portal: Portal, request: Request) -> Json:
    """The members of RFC 8414 section 2 and OpenID Connect Discovery section 3: what other sections do."""
    methods = METADATA_CHOICES["token_endpoint_auth_method"]
    # For introspection not none: a public client shows a token, by the name of its kind (RFC 8414 section 2).
    proofs = {"token": methods, "introspection": [*methods[1:], "Bearer"], "revocation": methods}
    scopes = [f"{whose}/*.{suffix}" for whose, letters in GRANTABLE_LETTERS.items()
              for suffix in (("rs", "read", "cu", "write") if "c" in letters else ("rs", "read"))]
    return {
        **addresses(portal.base(request), portal.browser_base(request)),
        "scopes_supported": [*PLAIN_SCOPES, *scopes],
        "response_types_supported": ["code"], "response_modes_supported": ["query"],
        "grant_types_supported": list(METADATA_CHOICES["grant_types"]),
        "code_challenge_methods_supported": ["S256"],
        **{f"{name}_endpoint_auth_methods_supported": list(accepted) for name, accepted in proofs.items()},
        **{f"{name}_endpoint_auth_signing_alg_values_supported": list(KEY_TYPES) for name in proofs},
        "authorization_response_iss_parameter_supported": portal.settings.strict,
        "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["RS256"],
        "claims_supported": ["iss", "sub", "aud", "exp", "iat", "auth_time", "nonce", "at_hash", "fhirUser",
                             "profile", "name", "email"],
        "request_parameter_supported": False, "request_uri_parameter_supported": False}


def addresses(base: str, browser_base: str) -> dict[str, str]:
    """The endpoints, absolute. One source for every document that names them, so that all agree."""
    return {"issuer": base, "authorization_endpoint": f"{browser_base}/oauth/authorize",
            "token_endpoint": f"{base}/oauth/token", "registration_endpoint": f"{base}/oauth/register",
            "management_endpoint": f"{browser_base}/apps", "revocation_endpoint": f"{base}/oauth/revoke",
            "introspection_endpoint": f"{base}/oauth/introspect",
            "userinfo_endpoint": f"{base}/oauth/userinfo", "jwks_uri": f"{base}/oauth/jwks"}


@route("GET /api/fhir/metadata", "FHIR capabilities, SMART oauth-uris", True, "fhir", "metadata")
def fhir_metadata(portal: Portal, request: Request) -> Response:
    """What the FHIR API can do, and where to get a token for it. Needs none itself."""
    return fhir_response(request, capability_statement(portal, request, True), version=portal.records.version)


def interactions_with(type_name: str, secured: bool) -> list[str]:
    """What may be done with a type, in a CapabilityStatement's words: see `answer_fhir` and `judge_write`."""
    codes = ["read", "vread"] if type_name == "Binary" else ["read", "vread", "search-type"]
    if secured and type_name in OWNER_ELEMENTS:
        codes += ["update"] if type_name == "Patient" else ["create", "update"]
    return codes


def capability_statement(portal: Portal, request: Request, secured: bool) -> Json:
    """What the FHIR API can do; with the OAuth addresses as SMART's first apps look for them (oauth-uris). A
    CapabilityStatement; in DSTU2 it was called Conformance, and told operations by reference until R4."""
    version, base = portal.records.version, portal.base(request)
    rest: Json = {"mode": "server"}
    if secured:
        known = addresses(base, portal.browser_base(request))
        words = {"authorize": "authorization", "token": "token", "register": "registration",
                 "manage": "management", "introspect": "introspection", "revoke": "revocation"}
        system = "http://terminology.hl7.org/CodeSystem/" if version == "r4" else "http://hl7.org/fhir/"
        service = {"system": system + "restful-security-service", "code": "SMART-on-FHIR"}
        rest["security"] = {"cors": True, "service": [{"coding": [service]}], "extension": [{
            "url": "http://fhir-registry.smarthealthit.org/StructureDefinition/oauth-uris", "extension": [
                {"url": word, "valueUri": known[f"{name}_endpoint"]} for word, name in words.items()]}]}
    statement = {
        "resourceType": "Conformance" if version == "dstu2" else "CapabilityStatement", "status": "active",
        "date": "2026-11-29", "kind": "instance", "publisher": portal.settings.name,
        "fhirVersion": FHIR_VERSIONS[version], "format": ["json", *JSON_TYPES[:3]],
        "software": {"name": "s4s_proxy.py", "version": __version__},
        "implementation": {"description": "A test server with made-up patients",
                           "url": f"{base}/api/{'fhir' if secured else 'open-fhir'}"}, "rest": [rest]}
    if version != "r4":
        statement["acceptUnknown"] = "no"
    portal.records.describe(statement, secured)
    return statement


# ######################################################################## 13 launch by a health record


def create_launch(portal: Portal, base: str, *, client_id: str | None = None, launch_uri: str | None = None,
                  username: str | None = None, patient_id: str | None = None, encounter_id: str | None = None,
                  intent: str | None = None, need_patient_banner: bool = True,
                  fhir_context: list[Json] | None = None) -> Json:
    """Launch an app as an EHR does (SMART, "Launch App: EHR Launch"): gives the address to open, and what is
    in it. The handle is for one app, once, within five minutes. It carries the choice of patient, not the
    right to see one: who signs in must be the user named here, if one is, and may open that record."""
    for name, value in (("client_id", client_id), ("launch_uri", launch_uri), ("username", username),
                        ("intent", intent), ("patient_id", patient_id), ("encounter_id", encounter_id)):
        need(value is None or (isinstance(value, str) and value), f"{name}: expected a string")
    uri = launch_address(portal, base, client_id, launch_uri)
    need(username is None or portal.user(username), f"username: there is no user {username!r}")
    need(patient_id is None or portal.patient_name(username or "clinician", patient_id),
         f"patient_id: {patient_id!r} is not a patient {f'of {username!r}' if username else 'known here'}")
    need(encounter_id is None or (patient_id and encounter_id in encounters_of(portal, patient_id)),
         f"encounter_id: {encounter_id!r} is not a visit of the patient")
    need(isinstance(need_patient_banner, bool), "need_patient_banner: expected true or false")
    check_fhir_context([] if fhir_context is None else fhir_context)
    context = {"encounter": encounter_id, "intent": intent, "need_patient_banner": need_patient_banner,
               "fhirContext": fhir_context}
    members = json.dumps({name: value for name, value in context.items() if value is not None})
    handle, now = secrets.token_urlsafe(24), portal.clock.now()
    with portal.state.transaction() as database:
        forget_expired(database, "launches", now - PENDING_SECONDS)  # a user may still be deciding on one
        database.execute("INSERT INTO launches VALUES (?, ?, ?, ?, ?, ?)",
                         (handle, client_id, username, patient_id, members, now + LAUNCH_SECONDS))
    iss = f"{base}/api/fhir"
    return {"launch_url": with_query(uri, iss=iss, launch=handle), "launch": handle, "iss": iss}


def launch_address(portal: Portal, base: str, client_id: str | None, launch_uri: str | None) -> str:
    """Where to open an app: what was given, if it is the client's, else the first that it registered."""
    registered = []
    if client_id:
        client = need(portal.client(client_id), f"client_id: {client_id!r} is not registered here")
        registered = uris_of(client, base, "launch_uris")
    uri = need(launch_uri or next(iter(registered), ""),
               "launch_uri: give the address to open, or an app (client_id) that has registered launch_uris")
    expected = f"of the client's {', '.join(registered)}" if registered else "an absolute http or https URL"
    need(is_web_url(uri) and (uri in registered or not registered), f"launch_uri: {uri!r} is not {expected}")
    return uri


def check_fhir_context(value: Any) -> None:
    """The member fhirContext: what else is open in the EHR (SMART, "fhirContext")."""
    need(isinstance(value, list), "fhir_context: expected an array of objects")
    for item in value:
        need(isinstance(item, dict) and {"reference", "canonical", "identifier"} & item.keys()
             and isinstance(item.get("identifier", {}), dict)
             and all(isinstance(item.get(name, ""), str) for name in ("canonical", "type")),
             "fhir_context: expected objects with a reference, a canonical or an identifier (an object)")
        reference, role = item.get("reference", "Basic/1"), item.get("role", "launch")
        need(isinstance(reference, str) and re.fullmatch(r"[A-Z][A-Za-z]+/[A-Za-z0-9.-]{1,64}", reference),
             "fhir_context: expected a relative reference such as ImagingStudy/1")
        need(isinstance(role, str) and re.fullmatch(r"launch|[A-Za-z][A-Za-z0-9+.-]*:.+", role),
             "fhir_context: expected an absolute URI as role")
        need(role != "launch" or not reference.startswith(("Patient/", "Encounter/")),
             "fhir_context: Patient and Encounter need a role; the launch's own are patient_id, encounter_id")


@route("GET /smart-style/{}", "SMART, Styling", cors=True)
def smart_style(portal: Portal, request: Request) -> Response:
    """The pages' colours and sizes, for an app that is launched from them. Others have another address."""
    need(request.rest == LOOK_DIGEST, "there is no such style", "not_found", 404)
    return Response(200, LOOK_JSON, "application/json", [("Cache-Control", "max-age=31536000, immutable")])


# ######################################################################## 14 identity


# What this server says by itself of a token or of who signed in, or would: RFC 7662 section 2.2, OpenID
# Connect Core section 2, SMART's launch context. Claims of the fixtures that are named so are not told.
OWN_CLAIMS = frozenset((
    "active", "scope", "client_id", "username", "token_type", "exp", "iat", "nbf", "sub", "aud", "iss", "jti",
    "auth_time", "nonce", "acr", "amr", "azp", "at_hash", "c_hash", "fhirUser", "profile", "patient",
    "encounter", "intent", "need_patient_banner", "smart_style_url", "fhirContext"))


def claims_of(portal: Portal, row: Row) -> Json:
    """Who the user of a grant or token is (OpenID Connect Core section 5.1): `sub`, and if the app may know
    it, `fhirUser`, the user's own resource, with another person's record not the patient (SMART, "Scopes for
    requesting identity data"); with the scopes `email` and `profile`, what the fixtures say (section 5.4).
    `profile` is what SMART 1.0 called it, Type/id, which its apps take apart at the slash."""
    words = row["token_scope"].split()
    if "openid" not in words:
        return {}
    user = portal.state.row("SELECT claims FROM users WHERE username = ?", row["username"])
    claims = {name: value for name, value in json.loads(user["claims"] if user else "{}").items()
              if ("email" if name.startswith("email") else "profile") in words and name not in OWN_CLAIMS}
    claims["sub"] = row["username"]
    who = portal.fhir_user(row["username"], row["patient_id"])
    if who and may_know_who(row):
        claims["fhirUser"] = f"{row['issuer']}/api/fhir/{who}"
        if "profile" in words:
            claims["profile"] = who
    return claims


def may_know_who(row: Row) -> bool:
    """Whether a token says more of its user than an opaque id."""
    return not {"fhirUser", "profile"}.isdisjoint(row["token_scope"].split())


def id_token(portal: Portal, grant: Row, access_token: str) -> str:
    """A signed statement of who signed in, for the app alone (OpenID Connect Core section 2)."""
    now = int(portal.clock.now())
    claims = {**claims_of(portal, grant), "iss": grant["issuer"], "aud": grant["client_id"], "iat": now,
              "exp": now + ACCESS_SECONDS, "auth_time": int(grant["signed_in"])}
    # It belongs to the access token that came with it, and to no other (section 3.1.3.6).
    claims["at_hash"] = base64url(hashlib.sha256(access_token.encode()).digest()[:16])
    if grant["nonce"]:
        claims["nonce"] = grant["nonce"]
    return sign_jwt(signing_key(portal), claims)


def signing_key(portal: Portal) -> RsaKey:
    """The key that signs id_tokens: made when first needed, then kept with the state."""
    with portal.key_lock:  # not the database's, since making a key takes half a second
        row = portal.state.row("SELECT p, q FROM keys")
        if row:
            return RsaKey(int(row["p"], 16), int(row["q"], 16))
        key = new_rsa_key()
        with portal.state.transaction() as database:  # another process may have been first
            database.execute("INSERT INTO keys SELECT ?, ? WHERE NOT EXISTS (SELECT * FROM keys)",
                             (f"{key.p:x}", f"{key.q:x}"))
    return signing_key(portal)


@route("GET /oauth/jwks", "RFC 7517 section 5", cors=True, fault="jwks")
def jwks(portal: Portal, request: Request) -> Response:
    """The public half of the key that signs id_tokens, for apps to verify them with."""
    return json_response({"keys": [signing_key(portal).public_jwk()]})


@route("GET,POST /oauth/userinfo", "OpenID Connect Core section 5.3", cors=True, fault="userinfo")
def userinfo(portal: Portal, request: Request) -> Response:
    """Who the user of an access token is: what the id_token says, and the name if the app may know it."""
    in_form = request.method == "POST" and request.media_type == "application/x-www-form-urlencoded"
    posted = Fields(request.form()).get("access_token") if in_form else ""
    need(not posted or bearer_value(request) is None, "the token is given twice, in header and form",
         headers=[challenge(error="invalid_request")])
    row = bearer(portal, request, posted)
    user = portal.user(row["username"] or "")
    claims = claims_of(portal, row) if user else {}
    if not claims:
        raise ScopeError("openid")
    return json_response({"name": user["name"], **claims} if user and may_know_who(row) else claims)


@route("GET /api/me", "S4S", cors=True, kind="fhir")
def me(portal: Portal, request: Request) -> Response:
    """The client of this token, and its good tokens for the same user and record; never their values."""
    row = bearer(portal, request)
    client = portal.client(row["client_id"])
    tokens = portal.state.rows(
        "SELECT tokens.scope, expires, approval_expires, patient_id FROM tokens JOIN grants USING (grant_id) "
        "WHERE kind = 'access' AND NOT spent AND NOT ended AND expires > ? AND client_id = ? "
        "AND username IS ? AND patient_id IS ? ORDER BY issued",
        portal.clock.now(), row["client_id"], row["username"], row["patient_id"])
    return json_response({
        "client_id": row["client_id"], "client_name": client.name if client else row["client_id"], "tokens": [
            {"scope": token["scope"], "patient": token["patient_id"],
             "access_expires": http_date(token["expires"]),
             "approval_expires": http_date(token["approval_expires"])} for token in tokens]})


# ######################################################################## 15 keys, and backend services

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_SECONDS, LEEWAY_SECONDS = 300, 10  # the longest life of an assertion; how far two clocks may differ
MAX_KEY_SET, MAX_KEY_SETS = 64 << 10, 100  # bytes of one, and how many are kept
KEY_TYPES = {"RS384": "RSA", "ES384": "EC"}  # what an app may sign with, and the kind of key it takes


def client_of_assertion(portal: Portal, request: Request, form: Fields) -> Client:
    """The client that signed the assertion (RFC 7523; SMART, "Client Authentication: Asymmetric")."""
    if form.get("client_assertion_type") != ASSERTION_TYPE:
        raise invalid_client(f"client_assertion_type: expected {ASSERTION_TYPE}")
    try:
        jwt = read_jwt(form.get("client_assertion"))
        client = claimed_client(portal, form, jwt.claims)
        check_assertion_header(client, jwt.header)
        # CORS is open for apps that act for a user. Nobody's page is to send this server about (SSRF).
        other = "jwks_uri" in client.metadata and another_site(portal, request)
        assertion_need(not other, f"{other}: no jwks_uri is fetched for a page of another site")
        check_assertion_signature(portal, client, jwt)
    except (ValueError, RecursionError) as error:
        raise invalid_client(f"client_assertion: {error}")
    # From here on it is known to be the client who says all this.
    check_assertion_audience(portal, request, jwt.claims)
    check_assertion_times(jwt.claims, portal.clock.now())
    spend_assertion(portal, client, jwt.claims)
    return client


def assertion_need(good: object, description: str) -> None:
    """Each way to fail has its own words, and the same error (RFC 7523 section 3.2)."""
    if not good:
        raise invalid_client(f"client_assertion: {description}")


def claimed_client(portal: Portal, form: Fields, claims: Json) -> Client:
    """Who it says it is, everywhere the same: of two names, two parts of a server could believe one each."""
    client_id = claims.get("iss")
    client = portal.client(client_id) if isinstance(client_id, str) else None
    same = claims.get("sub") == client_id and form.get("client_id") in ("", client_id)
    if not client or client.auth_method != "private_key_jwt" or not same:
        raise invalid_client("client_assertion: expected the client_id of a client that registered for "
                             "private_key_jwt as both iss and sub, and as client_id if that is sent")
    return client


def check_assertion_header(client: Client, header: Json) -> None:
    """The sender writes the header, so it may choose only from what was registered: "none" would need no key,
    HS256 take the public key for a secret (RFC 8725 section 2.1), another jku bring the sender's own key."""
    registered = client.metadata.get("token_endpoint_auth_signing_alg")
    known = [registered] if registered else list(KEY_TYPES)
    assertion_need(header.get("alg") in known, f"alg is {header.get('alg')!r}; expected {' or '.join(known)}")
    assertion_need(header.get("typ", "JWT") == "JWT", "typ: expected JWT")  # not a token of another use
    assertion_need(isinstance(header.get("kid"), str), "the header has no kid")
    assertion_need(header.get("jku") in (None, client.metadata.get("jwks_uri")),
                   "jku is not the jwks_uri that was registered")
    assertion_need("crit" not in header, "crit: no extension is understood here (RFC 7515 section 4.1.11)")


def check_assertion_signature(portal: Portal, client: Client, jwt: Jwt) -> None:
    """Anyone may write the rest; only the client has the private half of its key. ValueError if it is bad."""
    algorithm = str(jwt.header["alg"])
    key = assertion_key(portal, client, jwt.header["kid"], algorithm)
    assertion_need(verify(key, algorithm, jwt.signed, jwt.signature), "the signature is not by this key")


def check_assertion_audience(portal: Portal, request: Request, claims: Json) -> None:
    """It is meant for us (issuer, token endpoint or the one called): another server could send its own on."""
    bases = portal.settings.base_url or [portal.base(request)]
    ours = [base + path for base in bases for path in ("", "/oauth/token", request.path)]
    audiences = [name for name in as_list(claims.get("aud")) if isinstance(name, str)]
    assertion_need(any(same_address(name, url) for name in audiences for url in ours),
                   f"aud: expected {ours[1]} or {ours[0]}")


def check_assertion_times(claims: Json, now: float) -> None:
    """It is good now, and for minutes only: one that leaks is soon worth nothing (RFC 7519 section 4.1)."""
    moments, latest = {"nbf": 0, "iat": 0, "exp": None, **claims}, now + LEEWAY_SECONDS
    for name in ("exp", "nbf", "iat"):
        value = moments[name]
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        assertion_need(numeric and 0 <= value <= LAST_SECOND, f"{name} is {value!r}; expected a Unix time")
    assertion_need(moments["exp"] > now, "exp: it has expired")
    assertion_need(moments["exp"] <= latest + ASSERTION_SECONDS, "exp: more than five minutes ahead")
    assertion_need(max(moments["nbf"], moments["iat"]) <= latest, "nbf or iat is in the future")


def spend_assertion(portal: Portal, client: Client, claims: Json) -> None:
    """It counts once, so anyone who sees it on its way can't send it again (replay). Last, since only what
    the client signed may use up its jti; in one statement, so that of two that race one is first."""
    jti = claims.get("jti")
    assertion_need(jti and isinstance(jti, str), "jti: expected a string that was never used before")
    with portal.state.transaction() as database:
        forget_expired(database, "assertions", portal.clock.now())
        added = database.execute("INSERT OR IGNORE INTO assertions VALUES (?, ?, ?)",
                                 (client.client_id, jti, claims["exp"])).rowcount
    assertion_need(added, "jti was used before")


def assertion_key(portal: Portal, client: Client, kid: str, algorithm: str) -> Json:
    """The one key of a client with this name and for this algorithm (RFC 7517 section 4); else ValueError."""
    for fresh in (False, True):  # keys that were changed since they were fetched are fetched again
        keys = [key for key in client_keys(portal, client, fresh)
                if key.get("kid") == kid and key.get("kty") == KEY_TYPES[algorithm]
                and key.get("use", "sig") == "sig" and key.get("alg", algorithm) == algorithm]
        if keys or "jwks" in client.metadata:
            break
    if len(keys) != 1:
        raise ValueError(f"{len(keys)} keys of the client have kid {kid!r}, kty {KEY_TYPES[algorithm]} and, "
                         f"if they say so, use sig and alg {algorithm}; expected one")
    return keys[0]


def client_keys(portal: Portal, client: Client, fresh: bool) -> list[Json]:
    """A client's keys: registered, or fetched and kept as long as Cache-Control says; `fresh`: not kept."""
    if "jwks" in client.metadata:
        return key_set(client.metadata["jwks"])
    url, now, kept = client.metadata["jwks_uri"], portal.clock.now(), portal.key_sets
    until, text = kept.get(client.client_id, (0.0, b""))
    # A stranger's URL could make this server ask its neighbours things for the stranger (SSRF).
    stranger = client.registered_itself and not portal.settings.serves_debug
    try:
        if fresh or until <= now:
            text, lifetime = fetch(url, stranger, portal.sockets)
            until = now + lifetime
        keys = key_set(_JSON.decode(text.decode("utf-8")))
    except (OSError, BadRequest, ValueError, RecursionError) as error:
        # Told, it would show anyone who registers addresses which ports are open where.
        why = scrubbed(portal, f"{urlsplit(url).netloc}: {error!r}")
        portal.log(f"warning: jwks_uri of {client.client_id} at {why}")
        raise ValueError(f"jwks_uri: expected status 200 and a JSON Web Key Set of at most {MAX_KEY_SET} "
                         "bytes, in time; the server's log says what came")
    if len(kept) > MAX_KEY_SETS:  # anybody may register
        kept.clear()
    kept[client.client_id] = until, text
    return keys


def key_set(value: Any) -> list[Json]:
    """The keys of a JSON Web Key Set (RFC 7517 section 5); ValueError that says how an app should mend it."""
    keys = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
        raise ValueError('expected a JSON object with "keys", an array of objects')
    for name in ("d", "p", "q", "dp", "dq", "qi", "oth", "k"):
        if any(name in key for key in keys):
            raise ValueError(f"a key has the private member {name}: make new keys, give their public halves")
    if len({json.dumps([key.get("kty"), key.get("kid")]) for key in keys}) < len(keys):
        raise ValueError("two keys have the same kty and kid")
    return keys


def is_public(text: str) -> bool:
    """Whether an IP address is of the public internet. Of those that ipaddress calls global, none that leads
    on to an IPv4 address, which may be a neighbour's (NAT64, 6to4, IPv4-compatible), is a site's own, or a
    group's (multicast)."""
    import ipaddress  # takes long to import, and few need it
    address, near = ipaddress.ip_address(text), "64:ff9b::/32 2002::/16 ::/96 fec0::/10 ff00::/8 224.0.0.0/4"
    return address.is_global and not any(address in ipaddress.ip_network(net) for net in near.split())


def fetch(url: str, public_only: bool, sockets: OpenSockets, seconds: float = 5) -> tuple[bytes, float]:
    """What is at a URL, and for how many seconds it may be kept; OSError, BadRequest or ValueError if it does
    not come. No redirect is followed. public_only: only the public internet is asked, or a stranger could
    learn of our neighbours. A name is looked up once: the next time it may mean addresses not judged."""
    parts, deadline = urlsplit(url), time.monotonic() + seconds
    secure, host = parts.scheme.lower() == "https", parts.hostname or ""
    target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    message = (f"GET {target} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: application/json\r\n"
               "Connection: close\r\n\r\n").encode("ascii")
    known = socket.getaddrinfo(host, parts.port or (443 if secure else 80), type=socket.SOCK_STREAM)
    addresses = [(str(address[0]), int(address[1])) for *_, address in known]
    if public_only and not all(is_public(address) for address, _ in addresses):
        raise OSError("a client that registered itself has its keys at an address that is not public; while "
                      "debug controls are off, it takes --fixtures")
    opened = Connection(secure, host, addresses, deadline, sockets, MAX_KEY_SET)
    with contextlib.closing(opened):
        answer = opened.exchange(message, url, deadline)
    if answer.status != 200:
        raise OSError(f"it answered {answer.status}")
    control = answer.headers.get("cache-control", "").lower()
    age = re.search(r"\bmax-age=(\d{1,9})\b", control)
    forbidden = "no-store" in control or "no-cache" in control
    return answer.body, min(int(age[1]), 86400) if age and not forbidden else 0


def backend_token(portal: Portal, request: Request, client: Client, form: Fields) -> Json:
    """client_credentials (SMART, "Backend Services"): an app that acts for nobody, on all records. It must
    prove itself by its keys, and gets five minutes and no refresh token: it just asks again."""
    need(client.auth_method == "private_key_jwt", "client_credentials is for clients that registered for "
         "private_key_jwt", "unauthorized_client")
    need(portal.settings.serves_debug or not client.registered_itself, "this client registered itself; while "
         "debug controls are off, system/ scopes are for clients of --fixtures only", "unauthorized_client")
    other = client.registered_itself and another_site(portal, request)
    need(not other, f"{other}: a page of another site gets no token for a client that registered itself",
         "unauthorized_client")
    wanted = form.need("scope")
    scope = need(served_scope(portal, wanted, client.scope, ("system",)), f"scope {wanted!r}: nothing of it "
                 f"can be granted; expected system/ scopes within {client.scope!r}", "invalid_scope")
    now = portal.clock.now()
    grant = {"client_id": client.client_id, "scope": scope, "approval_expires": now + 300,
             "issuer": portal.base(request)}
    with portal.state.transaction() as database:
        return issue_tokens(portal, database, store_grant(database, grant, now), scope, now, False)


# ######################################################################## 16 granular scopes

# patient/Observation.rs?category=laboratory&status=final opens the laboratory results that are final: a
# resource must meet every pair, and of one pair's values, between commas, any. No modifiers, no chains, no
# _filter: SMART calls those experimental, and this server refuses them.
_CONSTRAINT = re.compile(r"(?!_filter=)([A-Za-z_][A-Za-z0-9_-]*)=([^&]+)")
_COMMA = re.compile(r"(?<!\\),")  # between alternatives; after a backslash a part of the value


def parse_constraints(text: str) -> tuple[tuple[str, str], ...] | None:
    """The search parameters (name, value) in ?name=value&..., none in ""; None for what is neither."""
    pairs = [_CONSTRAINT.fullmatch(pair) for pair in text[1:].split("&")] if text else []
    return tuple((pair[1], unquote(pair[2])) for pair in pairs if pair) if all(pairs) else None


def constraints_cover(wide: Sequence[tuple[str, str]], narrow: Sequence[tuple[str, str]]) -> bool:
    """Whether all that meets `narrow` meets `wide`: each pair of this stands there, with no value besides.

    >>> constraints_cover([("category", "a,b")], [("category", "b"), ("status", "final")])
    True
    >>> constraints_cover([("category", "a")], [])
    False
    """
    if set(wide) <= set(narrow):
        return True
    found: dict[tuple[str, str], set[frozenset[str]]] = {}  # by one of the values: `wide` must have it too
    for name, values in narrow:
        fewer = frozenset(_COMMA.split(values))
        found.setdefault((name, min(fewer)), set()).add(fewer)
    return all(any(fewer <= more for value in more for fewer in found.get((name, value), ()))
               for name, more in ((name, frozenset(_COMMA.split(values))) for name, values in wide))


@functools.lru_cache(16)
def scopes_by_value(scope: str) -> dict[tuple[str, ...], list[ResourceScope]]:
    """The resource scopes within a scope string by context, type, and each value that their rarest constraint
    takes: of hundreds that may stand there, those that could cover another are found at once."""
    kept: dict[tuple[str, ...], list[ResourceScope]] = {}
    scopes = resource_scopes(scope)
    counts = collections.Counter(pair for parsed in scopes for pair in parsed.constraints)
    for parsed in scopes:
        name, values = min(parsed.constraints, key=counts.__getitem__, default=("", ""))
        for value in _COMMA.split(values):
            kept.setdefault((parsed.context, parsed.type, name, value), []).append(parsed)
    return kept


def scopes_by_category(scope: str) -> dict[str, list[ResourceScope]]:
    """Of each category, in the consent page's order, the scopes within a scope string that reach it."""
    reached = [(parsed, categories_of(parsed)) for parsed in resource_scopes(scope)]
    return {label: [parsed for parsed, labels in reached if label in labels] for label in CATEGORIES}


def categories_of(scope: ResourceScope) -> list[str]:
    """The categories that a scope reaches: what its own ?category= names, else those of its type."""
    own = [value for name, text in scope.constraints if name == "category" for value in _COMMA.split(text)]
    if not own or scope.type not in _BY_CONTENT:
        return [label for label, (_, types) in CATEGORIES.items() if scope.type in ("*", *types)]
    codings = [{"system": value.rpartition("|")[0], "code": value.rpartition("|")[2]} for value in own]
    return [label for coding in codings
            for label in categories({"resourceType": scope.type, "category": [coding]})]


def chosen_scope(portal: Portal, scope: str, left: Sequence[str]) -> str:
    """What of a scope is granted where a person left these categories checked: an app must be able to tell
    "refused" from "none". What no scope can say stays as asked; `Access` hides what was not chosen anyway."""
    words = {word: words_left(portal, word, left) for word in scope.split()}
    chosen = " ".join(dict.fromkeys(granted for some in words.values() for granted in some))
    whole = " ".join(word for word, some in words.items() if some)  # where the parts would be too long
    return next(filter(SCOPE_SYNTAX.fullmatch, (chosen, whole)), scope)


def words_left(portal: Portal, word: str, left: Sequence[str]) -> list[str]:
    """What is granted of one word: none, if nothing is left of its type; for a part of Observation, a word
    for each category. SMART 1 has no ?, and other types, or all (*), no such parameters."""
    parsed, (head, _, own) = parse_scope(word), word.partition("?")
    reached = categories_of(parsed) if parsed else []
    kept = [label for label in reached if label in left]
    if not parsed or kept == reached or head.rpartition(".")[2] in LETTERS:
        return [word]
    if parsed.type != "Observation" or "other" in kept:
        return [word] if kept else []
    hl7 = "terminology.hl7.org/CodeSystem" if portal.records.version == "r4" else "hl7.org/fhir"
    pairs = [f"category=http://{hl7}/observation-category|{OBSERVATION_CODES[label]}" for label in kept]
    if "smoking" in kept:
        pairs.append(f"code={'|'.join(SMOKING_STATUS)}")
    return [f"{head}?{own and own + '&'}{pair}" for pair in pairs]


def served_scope(portal: Portal, wanted: str, registered: str,
                 contexts: Sequence[str] = ("patient", "user")) -> str:
    """`negotiate_scope`, less the types that are never served (section 11: nobody can tell whose they are).
    PortalError for a constraint that is no search parameter of the records' version with a value it takes:
    it would find nothing, and put words of the app's choice before the person who decides."""
    granted = " ".join(word for word in negotiate_scope(wanted, registered, contexts).split()
                       if not (scope := parse_scope(word)) or scope.type in SERVED_TYPES)
    for scope in resource_scopes(granted):
        for pair in scope.constraints:
            version = portal.records.version
            types = search_table(version) if scope.type == "*" else [scope.type]
            need(any(constraint_terms(version, type_name, (pair,)) for type_name in types),
                 f"scope {scope.text!r}: {pair[0]} is no search parameter of {scope.type}, or does not take "
                 f"{pair[1]!r}", "invalid_scope")
    return granted


def why_dropped(client: Client, word: str) -> str:
    """Why a word of a scope was not granted, or not as it was asked: for the log."""
    scope = parse_scope(word)
    if not scope and word not in PLAIN_SCOPES:
        return ": unknown here"
    if scope and (scope.context == "system" or scope.type not in SERVED_TYPES):
        return ": for backend services" if scope.context == "system" else ": of no type that is served"
    if word == "offline_access" and not client.may_use("refresh_token"):
        return ": the client did not register for refresh_token"
    return unregistered(client, word) or ": granted in part"


def unregistered(client: Client | None, *words: str) -> str:
    """Where none of these words of a scope is within what the client registered for: that this is why."""
    if not client or any(covered(client.scope, word) for word in words):
        return ""
    scope = excerpt(client.scope)
    return f": the client registered for {scope!r}: add it to the registration or to --fixtures"


def resource_matches(resource: Json, version: str, parameters: Sequence[tuple[str, str]]) -> bool:
    """Whether a resource meets search parameters (name, value), as a search for them would find it."""
    terms = constraint_terms(version, str(resource.get("resourceType")), tuple(parameters))
    return terms is not None and all(term.met_by(resource) for term in terms)


@remembered(100)
def constraint_terms(version: str, type_name: str,
                     parameters: tuple[tuple[str, str], ...]) -> list[SearchTerm] | None:
    """What resources of a type must meet; None, which none does, for an unknown type, parameter or value."""
    if type_name not in search_table(version):
        return None
    try:
        return [parse_term(version, type_name, name, text) for name, text in parameters]
    except FhirError:
        return None


# ======================================================================== Part Two: the records


# ######################################################################## 17 search


def within(values: list[Any], path: str) -> list[Any]:
    """All that stands at a dotted path in values, through lists."""
    for name in path.split("."):
        values = [item for value in values if isinstance(value, dict) and name in value
                  for item in (value[name] if isinstance(value[name], list) else (value[name],))]
    return values


def elements(resource: Any, *paths: str) -> list[Any]:
    """All values at dotted paths of a resource."""
    return [value for path in paths for value in within([resource], path)]


DOCUMENT_TYPES = ("DocumentReference", "DiagnosticReport")  # what may open a Binary by pointing to it


def attachments(document: Json) -> list[str]:
    """The addresses of a DocumentReference's or DiagnosticReport's files."""
    return list(map(str, elements(document, "content.attachment.url", "presentedForm.url")))


def tokens_of(values: Iterable[Any]) -> list[tuple[str, str]]:
    """(system, code) of codes, booleans, Codings, CodeableConcepts, Identifiers and ContactPoints."""
    tokens: list[tuple[str, str]] = []
    for value in values:
        if isinstance(value, dict):
            codings = value.get("coding")
            for coding in codings if isinstance(codings, list) else [value]:
                code = coding.get("code", coding.get("value")) if isinstance(coding, dict) else None
                if isinstance(code, str):
                    tokens.append((str(coding.get("system", "")), code))
        elif isinstance(value, (str, bool)):
            tokens.append(("", value if isinstance(value, str) else str(value).lower()))
    return tokens


def as_list(value: Any) -> list[Any]:
    """An element's values, however many: what may repeat in one version of FHIR is single in another."""
    return value if isinstance(value, list) else [] if value is None else [value]


def id_of(resource: Json) -> str | None:
    """A resource's id; None where it has none that FHIR allows."""
    key = resource.get("id")
    return key if isinstance(key, str) and FHIR_ID.fullmatch(key) else None


def holds_another(resource: Json, text: str) -> bool:
    """Whether a resource's JSON text holds one besides itself and its contained ones, where FHIR has none."""
    return text.count('"resourceType"') != 1 + len(as_list(resource.get("contained")))


def reference_of(element: Any) -> str:
    """The text of a FHIR Reference, "" if there is none."""
    text = element.get("reference") if isinstance(element, dict) else None
    return text if isinstance(text, str) else ""


# A resource is found by rows of values (SearchValue). A search is understood once, as a Query of SearchTerms,
# which compare columns of such rows with what was asked for: in SQL, where they lie in a table (section 18),
# and in Python, where one resource is held against a scope's ?param=value.

# What can be searched, a row for each type. An example:
#
#     Goal | subject category | dstu2 stu3: status | stu3 r4: @start-date=start[x] @target-date=target.due[x]
#
# A Goal is found by `subject`, before R4 by the code in `status`, from STU3 on by the date in target.dueDate.
# A type is served in the versions that its cells name, or in all, and found by `patient` and `identifier`,
# too, but for those after a minus. A parameter looks into the element of its own name in camel case, or into
# those after "=", with "+" between; [x] is each type that an element may have. It is a token, or a date (@),
# string (') or quantity (#), or a reference (REFERENCE_TARGETS), or what stands after ":". The names are each
# version's registry's, and some of guides for it: Argonaut's (CarePlan in DSTU2), US Core's, CARIN's
# (ExplanationOfBenefit). STU3's Coverage.patient is ours.
_ADDRESS = """'name=name+alias 'address 'address-city=address.city 'address-state=address.state
    'address-postalcode=address.postalCode 'address-country=address.country"""
_VISIT = "encounter=encounter+context | stu3: context"
_DRUG = "status code=medication[x] medication=medication[x]"
SEARCH_PARAMETERS = f"""\
Account | subject status type 'name owner
AdverseEvent | stu3 r4: -patient -identifier subject category @date recorder
AllergyIntolerance | category criticality type @date=recordedDate+assertedDate @onset=reaction.onset
    | dstu2: status substance=substance+reaction.substance | stu3 r4: clinical-status verification-status
    code=code+reaction.substance
Appointment | status part-status=participant.status @date=start actor=participant.actor
    practitioner=participant.actor location=participant.actor | stu3 r4: appointment-type service-type
    | r4: service-category specialty
AppointmentResponse | part-status=participantStatus appointment
Basic | subject code @created
Binary | -patient -identifier
BodySite | dstu2 stu3: code
BodyStructure | r4: location:token morphology
CarePlan | subject category status @date=period | dstu2: -identifier | stu3 r4: intent {_VISIT}
CareTeam | stu3 r4: subject category status @date=period participant=participant.member {_VISIT}
    | r4: role=participant.role
ChargeItem | stu3 r4: subject code @occurrence=occurrence[x] context
Claim | use | stu3 r4: @created encounter=item.encounter | r4: status
ClaimResponse | stu3 r4: outcome @created request
ClinicalImpression | -identifier status @date assessor | stu3 r4: subject | stu3: context | r4: encounter
Communication | subject status category medium @received @sent sender recipient {_VISIT} | stu3 r4: based-on
CommunicationRequest | subject status category sender recipient {_VISIT} | dstu2: @requested=requestedOn
    | stu3 r4: @authored=authoredOn
Composition | subject status type @date @period=event.period author encounter entry=section.entry 'title
    | dstu2 stu3: class | r4: category
Condition | category code severity asserter {_VISIT} | dstu2: clinicalstatus=clinicalStatus @onset=onset[x]
    @date-recorded=dateRecorded | stu3 r4: subject clinical-status verification-status @onset-date=onset[x]
    @abatement-date=abatement[x] | stu3: @asserted-date | r4: @recorded-date @asserted-date=extension
Consent | stu3 r4: status category @date=dateTime @period=period+provision.period organization
    consentor=consentingParty+performer | r4: scope
Coverage | stu3 r4: beneficiary type payor subscriber | r4: status
CoverageEligibilityRequest | r4: status @created
CoverageEligibilityResponse | r4: status outcome @created
DetectedIssue | dstu2 stu3: @date | r4: code @identified=identified[x]
Device | type | stu3 r4: status
DeviceRequest | stu3 r4: subject status intent code=code[x] @authored-on device=code[x]
    encounter=encounter+context
DeviceUseRequest | dstu2: -identifier subject device
DeviceUseStatement | -identifier subject device
DiagnosticOrder | dstu2: subject status code=item.code encounter
DiagnosticReport | subject category code status @date=effective[x] @issued result specimen
    performer=performer+performer.actor {_VISIT}
DocumentManifest | subject identifier=masterIdentifier+identifier status @created
DocumentReference | subject identifier=masterIdentifier+identifier status type @period=context.period author
    custodian encounter=context.encounter | dstu2 stu3: class @created @indexed | r4: category
    contenttype=content.attachment.contentType @date
EligibilityRequest | stu3: @created
Encounter | status type @date=period participant=participant.individual location=location.location
    | stu3 r4: subject class service-provider
    | r4: reason-code discharge-disposition=hospitalization.dischargeDisposition
Endpoint | stu3 r4: -patient status connection-type organization=managingOrganization 'name
EpisodeOfCare | status type @date=period care-manager
ExplanationOfBenefit | stu3 r4: @created claim provider coverage=insurance.coverage encounter=item.encounter
    care-team=careTeam.provider payee=payee.party | r4: status type insurer
    @service-date=billablePeriod+item.serviced[x] @billable-period-start=billablePeriod.start
    @service-start-date=billablePeriod.start+item.servicedDate+item.servicedPeriod.start
FamilyMemberHistory | code=condition.code @date | stu3 r4: status
Flag | subject @date=period author encounter | dstu2: -identifier
Goal | subject category | dstu2 stu3: status | stu3 r4: @start-date=start[x] @target-date=target.due[x]
    | r4: lifecycle-status achievement-status description | dstu2: @targetdate=targetDate
ImagingManifest | stu3: @authoring-time author
ImagingObjectSelection | dstu2: -identifier @authoring-time author
ImagingStudy | modality=series.modality @started | dstu2: -identifier
    | stu3 r4: endpoint=endpoint+series.endpoint | stu3: context | r4: subject status encounter
Immunization | status vaccine-code @date=date+occurrence[x] location manufacturer 'lot-number
    | dstu2 stu3: notgiven=wasNotGiven+notGiven | r4: status-reason reason-code
ImmunizationEvaluation | r4: status @date
ImmunizationRecommendation | @date=date+recommendation.date
Invoice | r4: subject status type @date
List | subject code status empty-reason @date encounter source item=entry.item 'title | dstu2: -identifier
Location | -patient status type organization=managingOrganization {_ADDRESS}
MeasureReport | stu3 r4: status | r4: subject @date @period
Media | subject type | stu3: context | r4: encounter
Medication | -patient code | dstu2 stu3: -identifier | stu3 r4: status
MedicationAdministration | {_DRUG} | dstu2 stu3: prescription | dstu2: @effectivetime=effectiveTime[x]
    encounter | stu3 r4: subject @effective-time=effective[x] context | r4: request
MedicationDispense | {_DRUG} type @whenhandedover=whenHandedOver @whenprepared=whenPrepared
    prescription=authorizingPrescription | stu3 r4: subject context
MedicationOrder | dstu2: {_DRUG} @datewritten=dateWritten encounter prescriber
MedicationRequest | stu3 r4: {_DRUG} subject intent category priority @authoredon=authoredOn
    requester=requester+requester.agent | stu3: context | r4: encounter
MedicationStatement | {_DRUG} | dstu2: @effectivedate=effective[x] | stu3 r4: subject category
    @effective=effective[x] context
MolecularSequence | r4: type
NutritionOrder | status @datetime=dateTime encounter
Observation | subject category code status value-concept=value[x] component-code=component.code
    data-absent-reason #value-quantity=value[x] #component-value-quantity=component.value[x]
    @date=effective[x] @value-date=value[x] performer specimen {_VISIT} | stu3 r4:
    combo-code=code+component.code | r4: has-member derived-from
Order | dstu2: subject @date
Organization | -patient type active partof=partOf {_ADDRESS}
Patient | -patient gender active telecom deceased=deceasedBoolean+deceasedDateTime
    language=communication.language @birthdate=birthDate organization=managingOrganization 'family=name.family
    'given=name.given phone=telecom email=telecom {_ADDRESS} | dstu2: @deathdate=deceasedDateTime
    | stu3 r4: @death-date=deceasedDateTime general-practitioner
Practitioner | -patient gender 'name 'family=name.family 'given=name.given phone=telecom email=telecom
PractitionerRole | stu3 r4: -patient active specialty role=code practitioner organization location endpoint
    phone=telecom email=telecom
Procedure | subject code @date=performed[x] location performer=performer.actor {_VISIT} | stu3 r4: category
    status
ProcedureRequest | dstu2 stu3: subject {_VISIT} | stu3: code intent status @authored=authoredOn
    @occurrence=occurrence[x]
Provenance | -identifier target location agent=agent.actor+agent.who+agent.whoReference
    | dstu2 stu3: @start=period.start @end=period.end | stu3 r4: agent-role=agent.role @recorded
    | r4: agent-type=agent.type @when=occurred[x]
Questionnaire | -patient status @date | dstu2: code=group.concept 'title=group.title 'version
    | stu3 r4: code=item.code 'name 'title url:uri version
QuestionnaireResponse | subject status @authored questionnaire author source | dstu2 r4: encounter
    | dstu2: -identifier | stu3: context
ReferralRequest | dstu2 stu3: -identifier status type priority specialty | dstu2: @date | stu3: subject
    @authored-on encounter=context context
RelatedPerson | gender @birthdate=birthDate 'name phone=telecom email=telecom
RequestGroup | stu3 r4: subject status intent @authored=authoredOn {_VISIT}
ResearchSubject | stu3 r4: individual status @date=period
RiskAssessment | subject @date=date+occurrence[x] encounter=encounter+context
Sequence | stu3: type
ServiceRequest | r4: subject category code intent status @authored=authoredOn @occurrence=occurrence[x]
    encounter requester
Specimen | subject type
Substance | -patient code=code+ingredient.substanceCodeableConcept category
SupplyDelivery | status
Task | stu3 r4: subject status intent code priority business-status performer:token=performerType @authored-on
    @modified=lastModified @period=executionPeriod owner focus based-on part-of
    requester=requester+requester.agent | stu3: context | r4: encounter
VisionPrescription | @datewritten=dateWritten encounter | r4: status
"""
# Reference parameters, and the types that they lead to: what _include, _revinclude and modifiers can name.
REFERENCE_TARGETS = {name: types.split() for types, names in {
    "Appointment": "appointment", "Claim": "claim", "Coverage": "coverage", "Device": "device",
    "Encounter": "encounter context", "Endpoint": "endpoint", "Location": "location",
    "Medication": "medication", "Specimen": "specimen", "MedicationRequest": "request",
    "MedicationOrder MedicationRequest": "prescription", "Questionnaire": "questionnaire",
    "Observation": "result has-member derived-from", "Patient": "patient subject beneficiary individual",
    "Practitioner": "prescriber practitioner", "Patient RelatedPerson": "subscriber",
    "Patient Practitioner RelatedPerson": "asserter", "Organization Patient RelatedPerson": "payor",
    "Organization": "organization custodian service-provider manufacturer partof insurer",
    "Organization Practitioner PractitionerRole": "general-practitioner provider care-team",
    "Organization Patient Practitioner PractitionerRole": "performer",
    "Organization Patient Practitioner PractitionerRole RelatedPerson":
        "author participant requester sender recipient agent payee",
    " ".join((*OWNER_ELEMENTS, *SHARED_TYPES)): "target focus item entry",
    "": "actor assessor based-on care-manager consentor owner part-of recorder source"
    }.items() for name in names.split()}
_KINDS = {"@": "date", "'": "string", "#": "quantity", **dict.fromkeys(REFERENCE_TARGETS, "reference"),
          **dict.fromkeys(("patient", "subject", "beneficiary", "individual"), "owner")}  # of the record


class Parameter(NamedTuple):
    """A search parameter: its kind, and the elements it looks into."""
    kind: str
    paths: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        """What FHIR calls this kind."""
        return {"owner": "reference", "id": "token", "updated": "date"}.get(self.kind, self.kind)


COMMON_PARAMETERS = {"_id": Parameter("id"), "_lastUpdated": Parameter("updated", ("meta.lastUpdated",)),
                     "_security": Parameter("token", ("meta.security",))}
RESULT_PARAMETERS = (
    "_count", "_elements", "_format", "_include", "_pretty", "_revinclude", "_sort", "_summary", "_total")
_OWN_COLUMNS = {  # kinds that need no rows: their columns are in the table resources, of which r is a row
    "id": {"value": "r.id"}, "owner": {"value": "r.patient_id"},
    "updated": {"first": "r.updated", "last": "(r.updated + 0.001)"}}
_CHOICES = {"date": ("DateTime", "Period", "Instant", "Date", "Timing"), "token": ("CodeableConcept",),
            "reference": ("Reference",), "quantity": ("Quantity",)}  # what may stand for [x]


@functools.cache
def search_table(version: str) -> dict[str, dict[str, Parameter]]:
    """The types that a version of the embedded records serves, and what each can be searched by."""
    served: dict[str, dict[str, Parameter]] = {}
    for type_name, *cells in table(SEARCH_PARAMETERS):
        parts = [cell.rpartition(": ") for cell in cells]
        texts = [text for versions, _, text in parts if not versions or version in versions]
        words = " ".join(["patient identifier", *texts]).split()
        if texts:
            served[type_name] = {**COMMON_PARAMETERS, **dict(
                _parameter(word) for word in words if word[0] != "-" and "-" + word not in words)}
    return served


def _parameter(word: str) -> tuple[str, Parameter]:
    """A parameter as SEARCH_PARAMETERS writes it, with its name."""
    name, _, paths = word.lstrip("@'#").partition("=")
    name, _, kind = name.partition(":")
    kind = kind or _KINDS.get(word[0]) or _KINDS.get(name, "token")
    paths = paths or re.sub(r"-(\w)", lambda match: match[1].upper(), name)
    return name, Parameter(kind, tuple(path.replace("[x]", choice) for path in paths.split("+")
                                       for choice in (_CHOICES[kind] if path.endswith("[x]") else ("",))))


@functools.cache
def referring(type_name: str, version: str) -> list[tuple[str, str]]:
    """The (type, parameter) pairs through which resources refer to a type."""
    names = [name for name, types in REFERENCE_TARGETS.items() if type_name in types]
    return [(source, name) for source, known in search_table(version).items() for name in names
            if name in known and known[name].type == "reference"]


MAX_VALUES = 500        # that one search compares with: SQLite's expressions are bounded
MAX_INCLUDED = 10_000   # resources on a page beside its matches


class Query(NamedTuple):
    """A search, understood: what to find and what to show of it."""
    type: str
    terms: tuple[SearchTerm, ...]            # all of which a match meets
    sort: tuple[tuple[str, bool], ...]       # parameter, falling
    includes: tuple[Include, ...]
    limit: int                               # matches on a page; 0: none, only the total
    total: bool
    after: tuple[Any, ...]                   # where the page before ended: see page_mark
    parameters: tuple[tuple[str, str], ...]  # those that took effect

    def patients(self) -> set[str]:
        """The ids of the patients that the search names."""
        return {str(comparisons[0].value) for term in self.terms for comparisons in term.alternatives
                if term.parameter.kind == "owner" or (self.type == "Patient" and term.parameter.kind == "id")}


@remembered(100)
def parse_query(version: str, type_name: str, parameters: Sequence[tuple[str, str]], base: str = "",
                lenient: bool = False) -> Query:
    """Search parameters, understood. FhirError for what is unknown, unless lenient: that is left out then."""
    costly = f"a search compares with at most {MAX_VALUES} values, and a date with ne, ge or le is two"
    _check(sum(text.count(",") + 1 for _, text in parameters) <= MAX_VALUES, costly, "too-costly")
    terms: list[SearchTerm] = []
    includes: dict[Include, None] = {}
    sort: dict[str, bool] = {}
    effective: list[tuple[str, str]] = []
    shown = {"_count": "20", "_summary": "false", "_total": "accurate", "_elements": "", "_page": ""}
    for name, text in parameters:
        try:
            if name in shown:
                shown[name] = text
            elif name in ("_include", "_revinclude"):
                includes.update(dict.fromkeys(_parse_include(version, type_name, name, text)))
            elif name == "_sort" or (version == "dstu2" and name in ("_sort:asc", "_sort:desc")):
                _parse_sort(version, type_name, name, text, sort)
            elif name not in ("_format", "_pretty"):
                terms.append(parse_term(version, type_name, name, text, base))
            effective.append((name, text))
        except FhirError as error:  # FHIR search, "Handling Errors": Prefer: handling=lenient
            if not lenient or error.error != "not-supported":
                raise
    _check(sum(len(term.alternatives) for term in terms) <= MAX_VALUES, costly, "too-costly")
    total, count = shown["_total"], shown["_count"]
    _check(total in ("accurate", "estimate", "none"), f"_total={total}: expected accurate, estimate or none")
    _check(re.fullmatch(r"[0-9]{1,18}", count), f"_count={count}: expected a whole number")
    limit = 0 if shown["_summary"] == "count" else min(int(count), 1000)
    return Query(type_name, tuple(terms), tuple(sort.items()), tuple(includes), limit, total != "none",
                 _parse_mark(shown["_page"]), tuple(effective))


def _check(good: Good | None, description: str, error: str = "value") -> Good:
    """`need`, with an error of FHIR's about a search."""
    return need(good, description, error, kind=FhirError)


class Include(NamedTuple):
    """_include, or in reverse _revinclude: resources that a match refers to, or that refer to a match."""
    reverse: bool
    source: str
    parameter: str
    target: str  # a type, or "" for any


def _parse_include(version: str, type_name: str, name: str, text: str) -> list[Include]:
    """_include=Type:parameter or Type:parameter:Target, with * for every parameter; _revinclude alike."""
    source, parameter, target = (*text.split(":", 2), "", "")[:3]
    reverse, known = name == "_revinclude", search_table(version)[type_name]
    possible = referring(type_name, version) if reverse else [
        (type_name, own) for own in known if known[own].type == "reference"]
    chosen = [Include(reverse, source, own, target) for kind, own in possible
              if kind == source and parameter in ("*", own) and (not reverse or target in ("", type_name))]
    words = {":".join(pair) for kind, own in possible for pair in ((kind, own), (kind, "*"))}
    _check(chosen, f"{name}={text}: not possible for {type_name}; possible are "
           + (", ".join(sorted(words)) or "none"), "not-supported")
    return chosen


def _parse_sort(version: str, type_name: str, parameter: str, text: str, sort: dict[str, bool]) -> None:
    """Add _sort=date,-code to what is sorted by; True: falling, _sort:desc=code in DSTU2 (its "Sorting")."""
    known, minus = search_table(version)[type_name], "" if version == "dstu2" else "-"
    words = {word: word.removeprefix(minus) for word in text.split(",")}
    for word, name in words.items():
        _check(name in known, f"{parameter}={text}: {word} can't be sorted by; {', '.join(sorted(known))} can"
               + ("" if minus else ", downwards with _sort:desc"), "not-supported")
    for word, name in words.items():
        sort.setdefault(name, parameter == "_sort:desc" or name != word)


def page_mark(keys: Sequence[Any]) -> str:
    """Where a page ended, for the link to the next: the sort keys and id of its last entry."""
    return base64url(json.dumps(keys).encode())


def _parse_mark(text: str) -> tuple[Any, ...]:
    """What page_mark wrote; nothing of nothing."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        keys = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))) if text else []
        json.dumps(keys, ensure_ascii=False).encode()  # fails, as does abs, for what SQLite can't take
        if isinstance(keys, list) and all(isinstance(key, str) or abs(key) < 1 << 63 for key in keys):
            return tuple(keys)
    raise FhirError("value", f"_page={text}: not a link of this server")


class Sql(NamedTuple):
    """A piece of SQL that a resource `r` must meet, and its values."""
    sql: str
    values: tuple[Any, ...] = ()


class Comparison(NamedTuple):
    """A column of a SearchValue held against a value, in SQL or in Python (_COMPARE)."""
    column: str
    operator: str
    value: str | float

    def sql(self, columns: Mapping[str, str]) -> str:
        """As SQL; columns: what some are called there."""
        column = columns.get(self.column, self.column)
        return f"instr({column}, ?) > 0" if self.operator == "contains" else f"{column} {self.operator} ?"


Comparisons = tuple[Comparison, ...]  # all of which must hold
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    "contains": operator.contains}
_PLACES = {"value": 1, "system": 2, "first": 3, "last": 4}  # of the columns in a SearchValue


class SearchTerm(NamedTuple):
    """One search parameter with its values: what a resource must meet, in SQL or in Python."""
    name: str
    parameter: Parameter
    alternatives: tuple[Comparisons, ...]  # one of them is enough: FHIR's comma
    negated: bool = False

    def as_sql(self, pinned: bool) -> Sql:
        """pinned: few resources are left to look at, so look at each; else start from the value."""
        kind, paths = self.parameter
        own = _OWN_COLUMNS.get(kind, {})
        if kind == "text":  # of which no rows are kept; the paths are our table's, so they may stand in SQL
            own = {"value": f"words(r.json, '{' '.join(paths)}')"}
        sql = _any_of([" AND ".join(comparison.sql(own) for comparison in comparisons) or "1"
                       for comparisons in self.alternatives])
        values = tuple(comparison.value for comparisons in self.alternatives for comparison in comparisons)
        if own:
            return Sql(f"({sql})", values)
        rows = f"FROM search_values WHERE parameter = ? AND ({sql})"
        if not pinned and not self.negated:
            return Sql(f"r.number IN (SELECT number {rows})", (self.name, *values))
        exists = "NOT EXISTS" if self.negated else "EXISTS"
        return Sql(f"{exists} (SELECT 1 {rows} AND number = r.number)", (self.name, *values))

    def met_by(self, resource: Json) -> bool:
        """The same in Python."""
        kind, paths = self.parameter
        if kind in ("owner", "id"):
            name = owner(resource) if kind == "owner" else str(resource.get("id"))
            rows: list[SearchValue] = [("", name, "", 0, 0)]
        else:
            rows = values_of(self.name, kind, elements(resource, *paths))
        met = any(all(_COMPARE[sign](row[_PLACES[column]], value) for column, sign, value in comparisons)
                  for row in rows for comparisons in self.alternatives)
        return met != self.negated


def _any_of(conditions: Sequence[str]) -> str:
    """Conditions joined by OR, half and half: SQLite takes a tree that is 1,000 deep, and a row is one."""
    half = len(conditions) // 2
    return f"({_any_of(conditions[:half])} OR {_any_of(conditions[half:])})" if half else conditions[0]


_MODIFIERS = {"token": "not missing text", "string": "exact contains missing",  # beside REFERENCE_TARGETS
              **dict.fromkeys(("date", "quantity", "reference", "uri"), "missing")}
# FHIR search, "Prefixes": how a resource's time (first, last) stands to the span searched for (start, end).
DATE_PREFIXES = {
    "eq": "first >= start and last <= end", "ne": "first < start or last > end",
    "gt": "last > end", "ge": "first >= start or last > end", "sa": "first >= end",
    "lt": "first < start", "le": "last <= end or first < start", "eb": "last <= start",
    "ap": "first < end and last > start"}
_QUANTITY = re.compile(rf"({'|'.join(DATE_PREFIXES)})?" r"(-?\d{1,20}(?:\.(\d{1,20}))?)"
                       r"(?:[eE]([+-]?\d{1,2}))?(?:\|([^|]*)\|([^|]*))?")


def parse_term(version: str, type_name: str, name: str, text: str, base: str = "") -> SearchTerm:
    """A search parameter and its values. `base` is what this server's own absolute references begin with.
    FhirError: not-supported where the parameter or its modifier isn't known, value where a value is none."""
    known = search_table(version)[type_name]
    bare, colon, modifier = name.partition(":")
    if bare not in known:
        raise FhirError("not-supported", f"{name}: unknown search parameter of {type_name}; known are "
                        + ", ".join(sorted([*known, *RESULT_PARAMETERS])))
    parameter = known[bare]
    types = REFERENCE_TARGETS.get(bare, ()) if parameter.type == "reference" else ()
    possible = [*_MODIFIERS.get(parameter.kind, "").split(), *types]
    if colon and modifier not in possible:
        takes = ", ".join(possible) or "none"
        raise FhirError("not-supported", f"{name}: unknown modifier; {bare} takes {takes}")
    if modifier == "missing":
        _check(text in ("true", "false"), f"{name}={text}: expected true or false")
        return SearchTerm(bare, parameter, ((),), negated=text == "true")  # (): any value will do
    if modifier == "text":
        parameter = Parameter("text", parameter.paths)
    if (bare, text) == ("deceased", "false"):  # whoever isn't said to be dead is alive
        modifier, text = "" if modifier else "not", "true"
    alternatives = [comparisons for word in _COMMA.split(text.replace("\\\\", "\0"))
                    for comparisons in _comparisons(bare, parameter.kind, modifier, word, base)]
    return SearchTerm(bare, parameter, tuple(alternatives), negated=modifier == "not")


def _comparisons(name: str, kind: str, modifier: str, text: str, base: str) -> Iterable[Comparisons]:
    """What one of a parameter's values asks for: some dates for one of two things, all else for one."""
    plain = _unescaped(text)
    if kind in ("date", "updated"):
        prefix, date = (plain[:2], plain[2:]) if plain[:2] in DATE_PREFIXES else ("eq", plain)
        more = f"; with a prefix ({', '.join(DATE_PREFIXES)}) or without"
        return _compare_span(prefix, *_span_asked(name, date, more))
    if kind in ("reference", "owner"):
        return [_compare_reference(kind, modifier, plain, base)]
    if kind == "quantity":
        return _compare_quantity(name, plain)
    if kind == "token":  # code, system|code, |code (of no system) or system| (any code)
        *systems, code = re.split(r"(?<!\\)\|", text, maxsplit=1)
        asked = [Comparison("system", "=", _unescaped(system)) for system in systems]
        return [(*asked, Comparison("value", "=", _unescaped(code))) if code or not systems else tuple(asked)]
    start = fold(plain)
    whole = {"id": ("value", "=", plain), "uri": ("value", "=", plain), "exact": ("system", "=", plain),
             "contains": ("value", "contains", start), "text": ("value", "contains", "\n" + start)}
    if (modifier or kind) in whole:
        return [(Comparison(*whole[modifier or kind]),)]
    return [(Comparison("value", ">=", start), Comparison("value", "<", start + "\U0010ffff"))]


def _unescaped(text: str) -> str:
    """A value without the backslashes before what is no separator; a doubled one has become NUL."""
    return re.sub(r"\\([,|$])", r"\1", text).replace("\0", "\\")


def _compare_span(prefix: str, start: float, end: float) -> Iterator[Comparisons]:
    """What a prefix asks of a value's span."""
    for alternative in DATE_PREFIXES[prefix].split(" or "):
        yield tuple(Comparison(column, sign, start if bound == "start" else end)
                    for column, sign, bound in map(str.split, alternative.split(" and ")))


def _span_asked(name: str, text: str, more: str = "") -> tuple[float, float]:
    """The span of time that a parameter names."""
    try:
        return date_range(text.replace(" ", "+"))  # a + in a URL that was not encoded
    except ValueError:
        raise FhirError("value", f"{name}={text}: expected a date such as 2008-07-10{more}")


def _compare_quantity(name: str, text: str) -> Iterator[Comparisons]:
    """[prefix]number, perhaps with |system|code: with no system the code may be the unit. Without a prefix,
    as precise as it is written: 5.4 is all from 5.35 to 5.45 (FHIR search)."""
    match = _check(_QUANTITY.fullmatch(text), f"{name}={text}: expected [prefix]number or "
                   "[prefix]number|system|code, such as gt5.4|http://unitsofmeasure.org|mg")
    prefix, digits, fraction, exponent, system, code = match.groups()
    number, places = float(f"{digits}e{exponent or 0}"), len(fraction or "") - int(exponent or 0)
    half = 0.5 * 10.0 ** -places
    width = {"ap": max(half, abs(number) / 10)}.get(prefix, half if prefix in (None, "eq", "ne") else 0)
    start, end = (round(bound, places + 1) for bound in (number - width, number + width))
    unit = tuple(Comparison(column, "=", value) for column, value in (("system", system), ("value", code))
                 if value)
    prefix = {None: "eq", "sa": "gt", "eb": "lt"}.get(prefix, prefix)
    for comparisons in _compare_span(prefix, start, end):
        yield (*comparisons, *unit)


def _compare_reference(kind: str, modifier: str, text: str, base: str) -> Comparisons:
    """An id, Type/id or a URL below `base`; a modifier is a type too, and an owner is a Patient."""
    name, bar, version = text.partition("|") if kind == "reference" else (text, "", "")  # see references_in
    type_name, target = reference_parts(name, base)
    wanted = modifier or ("Patient" if kind == "owner" else type_name or bar + version)
    if type_name and type_name != wanted:
        target = text  # as it stands this is no id, so it is found nowhere
    if wanted and kind == "reference":
        return Comparison("value", "=", target), Comparison("system", "=", wanted)
    return (Comparison("value", "=", target),)


SearchValue = tuple[str, str, str, float, float]  # parameter, value, system, first, last: as the table has it


def search_values(resource: Json, version: str) -> set[SearchValue]:
    """All that a resource can be found by, but for what its row in `resources` says: id, time and owner."""
    parameters, values = _parameters_by_element(version)[resource["resourceType"]], set()
    for element, value in resource.items():
        for name, kind, path in parameters.get(element, ()):
            inside = value if isinstance(value, list) else [value]
            values.update(values_of(name, kind, within(inside, path) if path else inside))
    # One that nobody can search by: the Binary that a document points to. Anyone who sees it may read that.
    if resource["resourceType"] in DOCUMENT_TYPES:
        for type_name, target in map(reference_parts, attachments(resource)):
            values.add(("_attachment", target, type_name, 0, 0))
    return values


@functools.cache
def _parameters_by_element(version: str) -> dict[str, dict[str, list[tuple[str, str, str]]]]:
    """The search table from the resource's side: type -> element -> (parameter, kind, path within it)."""
    types: dict[str, dict[str, list[tuple[str, str, str]]]] = {}
    for type_name, known in search_table(version).items():
        types[type_name] = {}
        for name, (kind, paths) in known.items():
            for path in paths if kind not in _OWN_COLUMNS else ():
                element, _, inner = path.partition(".")
                types[type_name].setdefault(element, []).append((name, kind, inner))
    return types


def values_of(name: str, kind: str, values: Iterable[Any]) -> list[SearchValue]:
    """What a search parameter of a kind makes of its elements' values."""
    if kind in ("token", "uri"):
        if name in ("phone", "email"):
            values = [value for value in values if isinstance(value, dict) and value.get("system") == name]
        elif name == "deceased":  # by a moment, too
            values = [value is not False for value in values]
        return [(name, code, system, 0, 0) for system, code in tokens_of(values)]
    if kind == "reference":
        return [(name, target, type_name, 0, 0) for type_name, target in references_in(values) if target]
    if kind == "quantity":
        return [(name, unit, system, number, number) for system, unit, number in quantities_in(values)]
    if kind == "string":
        return [(name, fold(text), text, 0, 0) for text in strings_of(values)]
    if kind == "text":
        return [(name, "".join("\n" + fold(text) for text in strings_of(
            value for value in values if isinstance(value, dict))), "", 0, 0)]
    if name == "asserted-date":  # before R4 an element, since then an extension
        values = [date for value in values for date in (elements(value, "valueDateTime") if isinstance(
            value, dict) and str(value.get("url")).endswith("/condition-assertedDate") else [value])]
    return [(name, "", "", *span) for span in map(period_of, values) if span]


def reference_parts(text: str, base: str = "") -> tuple[str, str]:
    """A reference, relative or below `base`, as (type, id); ("", text) for any other."""
    type_name, _, target = local_name(text, base).partition("/")
    return (type_name, target) if target else ("", text)


def references_in(values: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """What References name, (type, id), and canonicals, which are texts: ("|" and a version, if any; url)."""
    for value in values:
        text, bar, version = value.partition("|") if isinstance(value, str) else (reference_of(value), "", "")
        type_name, target = reference_parts(text)
        yield type_name or bar + version, target


def quantities_in(values: Iterable[Any]) -> Iterator[tuple[str, str, float]]:
    """(system, code, number) of Quantities, and the same with their unit where it is not the code."""
    for value in values:
        number = value.get("value") if isinstance(value, dict) else None
        if isinstance(number, (int, float)) and abs(number) < 1e99:
            code, unit = str(value.get("code", "")), str(value.get("unit", ""))
            yield str(value.get("system", "")), code, float(number)
            if unit not in ("", code):
                yield "", unit, float(number)


def strings_of(values: Iterable[Any]) -> Iterator[str]:
    """The text in strings, in the parts of HumanNames and Addresses, and beside codes."""
    for value in values:
        parts = [value] if isinstance(value, str) else elements(
            value, "family", "given", "text", "prefix", "suffix",
            "line", "city", "district", "state", "postalCode", "country",
            "display", "coding.display", "type.text")
        yield from (part for part in parts if isinstance(part, str))


def words_in(document: str, paths: str) -> str:
    """The words beside the codes at some paths of a resource, a line each: a function in SQL, for :text."""
    return values_of("", "text", elements(json.loads(document), *paths.split()))[0][1]


def fold(text: str) -> str:
    """Text as strings are compared: without case and accents (FHIR search, "string")."""
    if not text.isascii():
        import unicodedata  # only where it is needed: it takes long
        letters = unicodedata.normalize("NFKD", text)
        text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return text.casefold()


def period_of(value: Any) -> tuple[float, float] | None:
    """The span of a date, of a Period, which may lack its start or end, or of a Timing, of which the outer
    limits count (FHIR search, "date"): of its events, or of the Period that bounds it. None if it is none."""
    try:
        if isinstance(value, dict):
            spans = [date_range(event) for event in elements(value, "event")]
            spans += [(date_range(period["start"])[0] if "start" in period else -_EVER,
                       date_range(period["end"])[1] if "end" in period else _EVER)
                      for period in (value, *elements(value, "repeat.boundsPeriod"))
                      if "start" in period or "end" in period]
            return min(first for first, _ in spans), max(last for _, last in spans)
        return date_range(value)
    except (ValueError, TypeError):
        return None


_DATE = re.compile(r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d)"
                   r"(?::(\d\d)(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?)?)?")
_EVER = 1e15  # seconds: the end of a Period that has none


@remembered(4)
def date_range(text: str) -> tuple[float, float]:
    """The span of time that a FHIR date or time may mean: from its first moment to the one after its last.
    What has no time zone is UTC. ValueError if it is none.

    >>> date_range("1970-01")  # all of January
    (0.0, 2678400.0)
    """
    match = _DATE.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r} is no date")
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    moment = datetime.datetime(int(year), int(month or 1), int(day or 1), int(hour or 0), int(minute or 0),
                               59 if second == "60" else int(second or 0), tzinfo=datetime.timezone.utc)
    start = moment.timestamp() + float(fraction or 0)
    if not month:
        return start, start + 86400 * (365 + calendar.isleap(moment.year))
    if not day:
        return start, start + 86400 * calendar.monthrange(moment.year, moment.month)[1]
    if not hour:
        return start, start + 86400
    if zone and zone != "Z":
        start -= int(zone[:3]) * 3600 + int(zone[0] + zone[4:]) * 60
    if fraction:
        return start, start + 10.0 ** (1 - len(fraction))
    return start, start + (1 if second else 60)


# ######################################################################## 18 embedded records


class Records(Protocol):
    """The records as the protocol knows them: this section's, or section 19's. No endpoint asks which."""
    version: str         # of FHIR: a key of FHIR_VERSIONS
    warnings: list[str]  # what the person who starts the server should know
    has_accounts: bool = False  # every patient in them signs in by id
    one_request: contextlib.AbstractContextManager[object] = contextlib.nullcontext()  # while one is answered
    era: int = 0         # resets so far

    def check_type(self, asked: FhirRequest) -> None:
        """FhirError for a type that is not served."""
    def answer(self, asked: FhirRequest) -> Response:
        """A read is answered with the resource, if it may be seen; a search, or $everything in a patient's
        record, with a Bundle of those that may; a create or update that `judge_write` lets, with the new."""
    def describe(self, statement: Json, secured: bool) -> None:
        """Complete a CapabilityStatement with the types, parameters and operations that are served."""
    def find_patients(self, text: str = "") -> list[tuple[str, str]]:
        """(id, name) of the first patients, with a text of those that it names."""
    def patient_name(self, patient_id: str) -> str | None:
        """A patient's name; None where there is none of this id."""
    def birth_dates(self, patient_ids: list[str]) -> dict[str, str]:
        """When patients were born, of those of whom that is known at once."""
    def visits(self, patient_id: str) -> list[Json]:
        """A patient's Encounters, the first hundred."""
    def load(self, document: Json) -> int:
        """Add a resource, or those of a Bundle; gives how many."""
    def reset(self) -> None:
        """As at the start."""
    def close(self) -> None:
        """Let go of files and connections."""

    def lacks_patient(self, patient_id: str) -> bool:
        """Whether a patient whom an account names is surely not there."""
        return False

RECORD_SCHEMA = KEPT_BY + """
-- The health records: FHIR resources as JSON, and what they can be searched by.
PRAGMA cache_size = -32768;                       -- at most 32 MB of memory, however large the file
PRAGMA synchronous = NORMAL;                      -- what a power cut takes can be loaded again
CREATE TABLE IF NOT EXISTS resources (
    number INTEGER PRIMARY KEY, type TEXT NOT NULL, id TEXT NOT NULL,
    patient_id TEXT NOT NULL,                     -- whose record it is in; '' nobody's, '?' can't be told
    labels TEXT NOT NULL,                         -- its data categories, with spaces between
    updated REAL NOT NULL, version TEXT NOT NULL, -- meta.lastUpdated as Unix time, meta.versionId
    json TEXT NOT NULL, UNIQUE (type, id));
CREATE INDEX IF NOT EXISTS resources_by_patient ON resources (type, patient_id, id);

-- A row for each value of each search parameter: a token has system and value; a reference its id as value,
-- type as system; a string what it is compared as, and itself as system; a date the span that it may mean.
CREATE TABLE IF NOT EXISTS search_values (
    number INTEGER NOT NULL, parameter TEXT NOT NULL, value TEXT NOT NULL, system TEXT NOT NULL,
    first REAL NOT NULL, last REAL NOT NULL,
    PRIMARY KEY (number, parameter, value, system, first, last)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS search_by_value ON search_values (parameter, value);

-- References that wait for what they mean to be loaded: Practitioner?identifier=..., urn:uuid:...
CREATE TABLE IF NOT EXISTS unresolved (
    number INTEGER NOT NULL, reference TEXT NOT NULL, PRIMARY KEY (number, reference)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS unresolved_by_reference ON unresolved (reference);

-- What reset brings back: the JSON before a load or an app replaced it; NULL: it was not there. written: an
-- app did (1), and it may have taken another's identifier (2), by which a load would find it.
CREATE TABLE IF NOT EXISTS before_load (number INTEGER PRIMARY KEY, json TEXT, written INTEGER NOT NULL);

-- version: of FHIR; samples: they are in.
CREATE TABLE IF NOT EXISTS record_facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class StoredResource(Resource):
    """A resource as it lies in the database: owner and categories were noted when it was written."""
    base = ""

    def __init__(self, row: Row, records: EmbeddedRecords):
        self.number, self.type, self.id, self.owner, self.labels = row[:5]
        self.updated, self.version, self.text = row[5:8]
        self.row, self.records = row, records

    @functools.cached_property
    def content(self) -> Json:  # type: ignore[override]
        """The resource, parsed."""
        return cast(Json, json.loads(self.text))

    def categories(self) -> list[str]:
        """See Resource."""
        return str(self.labels).split()

    def is_pointed_to(self, access: Access) -> bool:
        """See Resource."""
        return self.id in access.binaries_in(self.records.pointing_to(str(self.id)))


class Page(NamedTuple):
    """One page of a search."""
    matches: list[StoredResource]
    next: str                   # the mark of the page after, "" if there is none
    hidden: bool                # whether something matched that may not be seen
    total: int | None = None    # how many match in all, where that may be told
    included: Sequence[StoredResource] = ()


@remembered(60)
def search_condition(query: Query, patients: frozenset[str]) -> Sql:
    """All that a match must meet; of `Access.may_see`, which has the last word, only whose it is. Where the
    patient or id is known SQLite looks there, else it starts from the values (hence the plus)."""
    is_shared = query.type in SHARED_TYPES
    is_bounded = not isinstance(patients, Everybody)
    pinned = ((is_bounded and not is_shared)
              or any(term.parameter.kind in ("owner", "id") for term in query.terms))
    parts = [term.as_sql(pinned) for term in query.terms]
    if patients is ALL_PATIENTS:
        parts.insert(0, Sql("r.patient_id != ?", (UNKNOWN,)))
    if is_bounded:
        whose = (*sorted(patients), NOBODY) if is_shared or query.type == "Device" else sorted(patients)
        parts.insert(0, Sql(f"r.patient_id IN ({_marks(whose)})", tuple(whose)))
    by_value = any(part.sql.startswith("r.number IN") for part in parts)
    parts.insert(0, Sql("+r.type = ?" if by_value else "r.type = ?", (query.type,)))
    values = [value for part in parts for value in part.values]
    return Sql(" AND ".join(part.sql for part in parts), tuple(values))


def _marks(values: Collection[Any]) -> str:
    """As many question marks as SQL needs for some values."""
    return ", ".join("?" * len(values))


def _comes_after(keys: Sequence[tuple[str, bool]], after: Sequence[Any]) -> Sql:
    """That a row comes after another in an order. The first half of it is what an index can use."""
    (name, falling), value = keys[0], after[0]
    sign = "<" if falling else ">"
    if len(keys) == 1:
        return Sql(f"{name} {sign} ?", (value,))
    rest = _comes_after(keys[1:], after[1:])
    return Sql(f"({name} {sign}= ? AND ({name} {sign} ? OR {rest.sql}))", (value, value, *rest.values))


_quote = remembered(8)(quote)  # the same few names and values stand in most searches


def bundle_response(asked: FhirRequest, page: Page, parameters: Sequence[tuple[str, str]], path: str,
                    version: str) -> Response:
    """A page as a Bundle, with its links. Entries go as they lie in the database, parsed but to be judged."""
    rest = [(name, value) for name, value in parameters if name != "_page"]
    links = {"self": parameters}
    if len(rest) < len(parameters):
        links["first"] = rest
    if page.next:
        links["next"] = [*rest, ("_page", page.next)]
    total = {} if page.total is None else {"total": page.total}
    url = f"{asked.base}/{path}?"
    text = json.dumps({"resourceType": "Bundle", "type": "searchset", **total, "link": [
        {"relation": relation, "url": (url + urlencode(pairs, quote_via=_quote, safe=",:/")).rstrip("?")}
        for relation, pairs in links.items()]})
    start, entries = '{"fullUrl":' + json.dumps(asked.base)[:-1], []
    for mode, resources in (("match", page.matches), ("include", page.included)):
        for resource in resources:
            entries.append(f'{start}/{resource.type}/{resource.id}","resource":{resource.text},'
                           f'"search":{{"mode":"{mode}"}}}}')
    if entries:
        text = text[:-1] + ', "entry": [' + ",\n".join(entries) + "]}"
    return fhir_response(asked.request, text, version=version)


EVERYTHING_PARAMETERS = ("_count", "_since", "_type", "end", "start")  # FHIR, Patient/[id]/$everything
# Whether a resource's care dates, from first to last, meet start and end; what has none always does.
CARE_DATES = """coalesce((SELECT min(first) < ? AND max(last) > ? FROM search_values WHERE number = r.number
    AND first < last AND parameter NOT IN ('birthdate', 'deathdate', 'death-date', 'value-date',
    'value-quantity', 'component-value-quantity')), 1)"""


def everything_asked(pairs: Sequence[tuple[str, str]]) -> tuple[set[str], dict[str, tuple[float, float]]]:
    """The types and the times that $everything is asked for; FhirError for what it does not take."""
    types, times = set[str](), dict.fromkeys(("_since", "start", "end"), (-_EVER, _EVER))
    for name, text in pairs:
        if name in times:
            times[name] = _span_asked(name, text)
        elif name == "_type":
            types.update(filter(None, text.split(",")))
        else:
            _check(name in ("_count", "_page", *NOT_FORWARDED), f"{name}: unknown parameter of $everything; "
                   f"known are {', '.join(EVERYTHING_PARAMETERS)}", "not-supported")
    return types, times


def describe_everything(rest: Json, version: str) -> None:
    """Name $everything in a CapabilityStatement, with what it takes."""
    url: Any = "http://hl7.org/fhir/OperationDefinition/Patient-everything"
    rest["documentation"] = f"Patient/[id]/$everything takes {', '.join(EVERYTHING_PARAMETERS)}"
    holders = [kind for kind in rest["resource"] if kind["type"] == "Patient"]
    if version != "r4":
        holders, url = [rest], {"reference": url}
    for holder in holders:
        holder["operation"] = [{"name": "everything", "definition": url}]


# Guides | what they are called | their profiles that the samples (section 20) meet, by type[:another name].
PROFILES = """\
http://hl7.org/fhir/us/core/ | us-core | AllergyIntolerance CarePlan CareTeam Condition
    Condition:condition-problems-health-concerns Coverage Device:implantable-device
    DiagnosticReport:diagnosticreport-lab DocumentReference Encounter Goal Immunization Location
    MedicationDispense MedicationRequest Observation:observation-lab Observation:smokingstatus
    Observation:vital-signs Observation:blood-pressure Observation:bmi Observation:body-height
    Observation:body-temperature Observation:body-weight Observation:heart-rate Observation:pulse-oximetry
    Observation:respiratory-rate Organization Patient Practitioner PractitionerRole Procedure Provenance
    QuestionnaireResponse RelatedPerson
http://hl7.org/fhir/uv/ipa/ | ipa | AllergyIntolerance Condition DocumentReference Immunization
    MedicationRequest MedicationStatement Observation Patient Practitioner PractitionerRole"""


def describe_profiles(statement: Json) -> None:
    """Name in a CapabilityStatement of R4 what servers of US Core and IPA do, and the profiles."""
    described = {kind["type"]: kind for kind in statement["rest"][0]["resource"]}
    for base, guide, words in table(PROFILES):
        statement.setdefault("instantiates", []).append(f"{base}CapabilityStatement/{guide}-server")
        for type_name, _, name in (word.partition(":") for word in words.split()):
            described[type_name].setdefault("supportedProfile", []).append(
                f"{base}StructureDefinition/{guide}-{name or type_name.lower()}")


# The members by which something is judged where they are missing, too.
JUDGED = OWNER_NAMES | {"category", "code", "coding", "contained", "id", "reference", "system", "url"}


def odd_members(value: Any) -> set[str]:
    """The members of a JSON object that another server may take for others: for subject it may take Subject,
    or one with an old long s. Those that stand twice then, or are one of JUDGED in other letters."""
    if not isinstance(value, dict):
        return set()
    last = {name.lower(): name for name in value}
    return {name for name in value if last[name.lower()] != name or not name.isascii()
            or not name.isidentifier() or (name.lower() in JUDGED and name not in JUDGED)}


def sent_resource(asked: FhirRequest, version: str) -> Json:
    """What a client wants to have written, as far as address, version and its own words tell; else 400."""
    request, resource = asked.request, asked.request.json()
    key = asked.id and resource.get("id")  # one in a create is ignored (FHIR, "create")
    odd = set[str]().union(*map(odd_members, values_within(resource)))
    for good, expected in (
            ((resource.get("resourceType"), key) == (asked.type, asked.id), "a resource of this type and id"),
            (isinstance(resource.get("meta", {}), dict), "an object as meta"),
            ("SUBSETTED" not in elements(resource, "meta.tag.code"), "a whole resource, not one SUBSETTED"),
            ({"if-none-exist", "if-none-match", "if-unmodified-since"}.isdisjoint(request.headers),
             "no condition but If-Match: search, then write"),  # to pass over one would break a promise
            (not odd, f"each member once, in FHIR's own letters; not {', '.join(sorted(odd))}")):
        need(good, f"{request.method} {asked.path}: expected {expected}", "invalid", kind=FhirError)
    check_version(resource, version)
    return resource


MAX_POINTED = 100  # files and targets of one resource that is written: each is looked for
_FILE = re.compile("(?:^|/)binary[/?]", re.IGNORECASE)
_ABROAD = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*:")  # an address with a scheme


def check_pointers(records: Records, asked: FhirRequest, resource: Json, abroad: bool) -> None:
    """403 if what is to be written points to a Binary that the token does not open already: a document opens
    what it points to. However it is spelled: who knows what a FHIR server makes of dots or percent signs. And
    with `abroad` on whatever server, for the one behind may have names that nobody knows here. Nor may a
    Provenance be about what the token does not read: that it may be written would tell what is there."""
    base, links = asked.base, set[str]()
    targets = elements(resource, "target.reference") if asked.type == "Provenance" else []
    pointed = dict.fromkeys(map(str, targets))
    for value in values_within(resource):
        # Before these come themselves.
        links.update(text for text in elements(value, "url", "reference") if isinstance(text, str))
        if isinstance(value, str):
            plain = re.sub(r"\s", "", unquote(unquote(value)).replace("\\", "/"))
            is_near = abroad or value.startswith(base + "/") or not _ABROAD.match(value)
            is_prose = " " in value.strip() and value not in links
            if is_near and not is_prose and _FILE.search(plain):
                pointed[value] = None
        if abroad and any("?" in text for text in elements(value, "reference") if isinstance(text, str)):
            permit(False, f"the {asked.type} sent refers to what a search finds: the FHIR server behind "
                   "would look into other records for it")
    permit(len(pointed) <= MAX_POINTED, f"the {asked.type} sent points to more than {MAX_POINTED} places")
    for address in pointed:
        type_name, _, key = local_name(address, base).partition("/")
        try:
            permit(key, "not by the address [type]/[id]")
            answer_fhir(records, asked._replace(request=Request("GET", "", {}), interaction="read",
                                                type=type_name, id=key))
        except FhirError as error:
            permit(error.status not in (403, 404), f"the {asked.type} sent points to what this token does "
                   f"not open: {error.description}")
            raise


def is_unchanged(request: Request, tag: str, updated: float) -> bool:
    """Whether a client's copy is still good: If-None-Match, else If-Modified-Since (RFC 9110 13.1)."""
    known, since = request.headers.get("if-none-match"), request.headers.get("if-modified-since")
    if known is not None:
        return known.strip() == "*" or tag in [kept.strip().replace("W/", "") for kept in known.split(",")]
    try:
        return since is not None and updated < email.utils.parsedate_to_datetime(since).timestamp() + 1
    except (TypeError, ValueError, IndexError, OverflowError):
        return False


# What shows a resource's version of FHIR: versions | types or elements (:JSON type, where others have them).
TELLTALES = """\
dstu2 | AllergyIntolerance.substance ClinicalImpression.patient Condition.patient DiagnosticOrder \
    Encounter.class:string Encounter.patient Immunization.wasNotGiven MedicationAdministration.patient \
    MedicationDispense.patient MedicationOrder MedicationStatement.patient Observation.category:object \
    Patient.name.family:array Practitioner.name:object Questionnaire.group QuestionnaireResponse.group \
    ReferralRequest.patient
dstu2 stu3 | Condition.clinicalStatus:string DiagnosticReport.category:object DocumentReference.indexed \
    ImagingStudy.patient ImagingStudy.uid Immunization.date ProcedureRequest \
    QuestionnaireResponse.questionnaire:object
stu3 | AllergyIntolerance.clinicalStatus:string ExplanationOfBenefit.insurance:object Immunization.notGiven \
    MeasureReport.patient MedicationRequest.requester.agent MedicationStatement.taken ReferralRequest.subject
stu3 r4 | CareTeam ClinicalImpression.subject Condition.subject Encounter.class:object Encounter.subject \
    Endpoint MedicationAdministration.subject MedicationDispense.subject MedicationRequest \
    MedicationStatement.subject Observation.category:array Patient.name.family:string \
    Practitioner.name:array PractitionerRole Questionnaire.item
r4 | AllergyIntolerance.clinicalStatus:object Condition.clinicalStatus:object DocumentReference.date \
    DiagnosticReport.category:array ExplanationOfBenefit.insurance:array ImagingStudy.subject \
    Immunization.occurrenceDateTime MeasureReport.subject QuestionnaireResponse.questionnaire:string \
    ServiceRequest
"""
_JSON_TYPES: dict[type, str] = {dict: "object", list: "array", str: "string"}


def check_version(resource: Json, version: str) -> None:
    """PortalError if a resource is visibly of another version of FHIR than the records."""
    for path, kind, versions in _telltales(version).get(resource["resourceType"], ()):
        above, _, name = path.rpartition(".")
        for holder in elements(resource, above) if above else [resource]:
            if (isinstance(holder, dict) and name in holder
                    and kind in ("", _JSON_TYPES.get(type(holder[name])))):
                sign, theirs = f"{path} {kind}".strip(), versions.replace(" ", " or ")
                raise PortalError("invalid_request", f"{sign} is of {theirs}, the records are {version}: "
                                  "choose with --fhir-version, or the FHIR server behind")


@functools.cache
def _telltales(version: str) -> dict[str, list[tuple[str, str, str]]]:
    """What speaks against a version, by type of resource: (path, JSON type or "" for any, versions)."""
    against: dict[str, list[tuple[str, str, str]]] = {}
    for versions, signs in table(TELLTALES):
        for sign in signs.split() if version not in versions else ():
            place, _, kind = sign.partition(":")
            type_name, _, path = place.partition(".")
            against.setdefault(type_name, []).append((path or "resourceType", kind, versions))
    return against


_ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False, check_circular=False)
_RELATIVE_IN_JSON = re.compile(r'"reference":"([A-Z][A-Za-z]+)/([A-Za-z0-9.-]{1,64})"')
_ABSOLUTE = re.compile(rf"(?:https?://[^?#]+|\.\.\.)/([A-Z][A-Za-z]+)/({_ID})(?:/_history/{_ID})?")


def instant(seconds: float) -> str:
    """A Unix time as FHIR writes it: 2026-01-31T12:00:00.000Z."""
    since = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=seconds)
    return since.isoformat(timespec="milliseconds") + "Z"


class Prepared(NamedTuple):
    """A resource ready to be written: all that takes time is done, and no lock was held."""
    resource: Json
    row: tuple[Any, ...]     # as the table resources has it, less the number
    values: set[SearchValue]
    unresolved: Collection[str]  # references that are no Type/id yet, as Load.point gives them
    given: Json              # its meta, as it came

    def names(self) -> list[str]:
        """What references that are no Type/id may call it."""
        type_name, key = self.row[:2]
        return [f".../{type_name}/{key}", f"urn:uuid:{key}", f"urn:oid:{key}", f"{type_name}?_id={key}",
                *(f"{type_name}?identifier={system}|{value}" for name, value, system, *_ in self.values
                  if name == "identifier")]


def prepare(resource: Json, version: str, now: str = "", unresolved: Collection[str] = ()) -> Prepared:
    """A resource ready to be written, its meta completed; `unresolved` is Load.point's, and what an app
    writes waits for nothing. PortalError for what FHIR does not allow."""
    given = resource.get("meta", {})
    need(isinstance(given, dict), "meta: expected an object")
    meta = {"versionId": "1", "lastUpdated": now, **given}
    resource = {**resource, "meta": meta}
    for name, key in (("id", resource["id"]), ("meta.versionId", meta["versionId"])):
        if not isinstance(key, str) or not FHIR_ID.fullmatch(key):
            must(False, name, "a string of 1 to 64 of A-Z a-z 0-9 - .", key)
    try:
        updated = date_range(meta["lastUpdated"])[0]
        moment(updated)  # fails for what no calendar can write: the first and last hours of all, elsewhere
    except (ValueError, TypeError, OverflowError):
        must(False, "meta.lastUpdated", "a time such as 2026-01-31T12:00:00Z", meta["lastUpdated"])
    try:
        text = _ENCODER.encode(resource)
        text.encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise PortalError("invalid_request", f"can't be written as JSON: {error}")
    whose = UNKNOWN if holds_another(resource, text) else owner(resource)
    row = (resource["resourceType"], resource["id"], whose, " ".join(categories(resource)), updated,
           meta["versionId"], text)
    return Prepared(resource, row, search_values(resource, version), unresolved, given)


def _erase(database: sqlite3.Connection, number: int) -> None:
    """Take a resource out, with all that leads to it."""
    for name in ("resources", "search_values", "unresolved"):
        database.execute(f"DELETE FROM {name} WHERE number = ?", (number,))


def _write(database: sqlite3.Connection, number: int | None, new: Prepared) -> int:
    """Put a resource in a place, with None the last, unless its type and id are there. Its number, or 0."""
    if number is not None:
        _erase(database, number)
    sql = "INSERT OR IGNORE INTO resources VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    added = database.execute(sql, (number, *new.row))
    if not added.rowcount:
        return 0
    number = int(added.lastrowid or 0)
    database.executemany("INSERT INTO search_values VALUES (?, ?, ?, ?, ?, ?)",
                         [(number, *value) for value in new.values])
    database.executemany("INSERT INTO unresolved VALUES (?, ?)", [(number, text) for text in new.unresolved])
    return number


def provenances_of(database: sqlite3.Connection, numbers: Iterable[int]) -> set[int]:
    """The numbers of some resources, and of the Provenances that are about them."""
    sql = ("SELECT v.number FROM resources r JOIN search_values v ON v.parameter = 'target' "
           "AND v.value = r.id AND v.system = r.type WHERE r.number = ?")
    return {*numbers, *(row[0] for number in numbers for row in database.execute(sql, (number,)))}


def place_provenances(database: sqlite3.Connection, numbers: Iterable[int] | None = None) -> None:
    """Note whose the Provenances are, of these numbers or all: their targets may have come after them."""
    if numbers is None:
        found = database.execute("SELECT number FROM resources WHERE type = 'Provenance'")
        numbers = [row[0] for row in found.fetchall()]
    for number in numbers:
        sql = "SELECT json FROM resources WHERE number = ? AND type = 'Provenance'"
        for (text,) in database.execute(sql, (number,)).fetchall():
            targets = database.execute(
                "SELECT system || '/' || value, patient_id FROM search_values v JOIN resources "
                "ON type = system AND id = value WHERE v.number = ? AND parameter = 'target' "
                "AND type != 'Provenance'", (number,))  # of one about another nobody could keep track
            whose = owner(json.loads(text), "", dict(map(tuple, targets)))
            database.execute("UPDATE resources SET patient_id = ? WHERE number = ?", (whose, number))


def parse_document(given: bytes | Json) -> Any:
    """A text as JSON, or a dict as if it were text; PortalError, which says where it goes wrong."""
    try:
        return json.loads(given.decode("utf-8-sig") if isinstance(given, bytes) else json.dumps(given))
    except RecursionError:
        raise PortalError("invalid_request", "the JSON nests too deep")
    except (ValueError, TypeError) as error:
        raise PortalError("invalid_request", f"not JSON: {error}")


def unbundle(document: Any, at: str = "") -> tuple[list[tuple[str, Json]], dict[str, str | None]]:
    """The resources of a document with their places in it, and what their fullUrls mean: Type/id."""
    resources: list[tuple[str, Json]] = []
    names: dict[str, str | None] = {}
    if isinstance(document, list):  # of resources, of Bundles
        for place, item in enumerate(document):
            inner, meanings = unbundle(item, f"[{place}]: ")
            resources += inner
            names.update(meanings)
        return resources, names
    if not isinstance(document, dict) or document.get("resourceType") != "Bundle":
        return [(at, _with_id(document, {}, at))], {}
    entries = document.get("entry", [])
    need(isinstance(entries, list) and document.get("type") != "history",
         f"{at}Bundle: expected a transaction, batch, collection or searchset, with an array of entries")
    for place, entry in enumerate(entries):
        where = f"{at}Bundle.entry[{place}]"
        need(isinstance(entry, dict), f"{where}: expected an object")
        if "resource" in entry:  # a batch's GET and DELETE have none
            resource = _with_id(entry["resource"], entry, f"{where}.resource: ")
            resources.append((f"{where}.resource ({resource['resourceType']}): ", resource))
            if id_of(resource) and isinstance(entry.get("fullUrl"), str):
                names[entry["fullUrl"]] = f"{resource['resourceType']}/{resource['id']}"
    return resources, names


def _with_id(resource: Any, entry: Json, where: str) -> Json:
    """A resource with an id: its own, else from the entry's fullUrl (urn:uuid:...) or request, else a hash of
    its content, so that loading it twice gives the same. PortalError if it is no FHIR resource."""
    need(isinstance(resource, dict) and isinstance(resource.get("resourceType"), str),
         f"{where}not a FHIR resource: expected an object with a resourceType")
    key = resource.get("id")
    if key is None:
        for text in elements(entry, "fullUrl", "request.url"):
            match = re.fullmatch(r"(?:urn:uuid:|urn:oid:|.*/)([A-Za-z0-9.-]{1,64})", str(text))
            key = key or (match and match[1])
        key = key or hashlib.sha256(json.dumps(resource, sort_keys=True).encode()).hexdigest()[:32]
        resource = {**resource, "id": key}
    return cast(Json, resource)


def display_name(patient: Json) -> str:
    """A Patient's name as people are shown it; its id if it has none."""
    for name in elements(patient, "name"):
        words = [text for text in elements(name, "text") if text] or elements(name, "given", "family")
        if words:
            return " ".join(map(str, words))
    return str(patient.get("id"))


class Source(NamedTuple):
    """One thing to load: a file, or a dict that Server(data=...) was given."""
    path: str
    size: int
    given: Json | None = None
    is_chosen: bool = True  # and not merely found in a folder, among what tools leave there

    def documents(self) -> Iterator[tuple[str, Any, int]]:
        """The JSON texts in it, each with its place and the bytes read by then: one a line (only that is in
        memory) where the file's name says NDJSON, or the first line is JSON by itself; else one in all."""
        if self.given is not None:
            yield "", parse_document(self.given), self.size
            return
        import gzip  # only where it is needed: it takes long
        with open(self.path, "rb") as raw, gzip.open(raw) if self.path.endswith(".gz") else raw as stream:
            has_lines = bool(re.search(r"\.(ndjson|jsonl)(\.gz)?$", self.path))
            for number, line in enumerate(itertools.chain([b""], stream)):
                if not line.strip():
                    continue
                try:
                    document = parse_document(line)
                except PortalError as error:
                    if has_lines:
                        raise PortalError(error.error, f"line {number}: {error.description}")
                    break
                has_lines = True
                yield f"line {number}: ", document, raw.tell()
            if not has_lines:  # one text over many lines
                yield "", parse_document(b"\n" * (number - 1) + line + stream.read()), self.size


def sources(data: Any) -> list[Source]:
    """What an item of --data names: a resource or Bundle, a file, or those of a folder that may hold FHIR."""
    if isinstance(data, dict):
        return [Source("(given as a dict)", 0, data)]
    if not isinstance(data, (str, os.PathLike)):
        raise StartError(f"data {data!r}: expected a path, or a resource or Bundle as a dict")
    path = os.fspath(data)
    try:
        if not os.path.isdir(path):
            return [Source(path, os.stat(path).st_size)]
        files = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
                 if re.search(r"\.(json|ndjson|jsonl)(\.gz)?$", name)]
        files.sort(key=_load_order)
        hidden = {name for name in files if re.search(r"(^|[/\\])\.", os.path.relpath(name, path))
                  or not os.path.isfile(name)}  # but a pipe, say, which may never end
        if files:  # a hidden one is not opened: as if nothing were in it
            return [Source(name, 0, {}, False) if name in hidden else
                    Source(name, os.stat(name).st_size, None, False) for name in files]
    except OSError as error:
        raise StartError(f"--data {path}: {error.strerror}; name a file or folder that can be read")
    raise StartError(f"--data {path}: no .json, .ndjson or .jsonl file (or .gz of one) in this folder")


def _load_order(path: str) -> tuple[int, str]:
    """Files that others refer to come first (what refers to nothing yet is written twice), and by swapcase
    Synthea's hospitalInformation and practitionerInformation."""
    first, name = ("Organization", "Location", "Practitioner", "Patient", "Encounter"), os.path.basename(path)
    return next((place for place, type_name in enumerate(first) if type_name in name), 9), path.swapcase()


def says_it_is_fhir(value: Any) -> bool:
    """Whether a JSON value, or the first in an array, has a resourceType."""
    first = value[0] if isinstance(value, list) and value else value
    return first == [] or (isinstance(first, dict) and "resourceType" in first)


class Progress:
    """A line on standard error now and then, for a load that takes more than a second."""
    def __init__(self, total: int, clock: Clock):
        self.total, self.clock = total, clock
        self.begun = self.shown = clock.now()

    def at(self, read: int) -> None:
        """Say how far it is, unless that was just said."""
        now = self.clock.now()
        if now - self.shown >= 1 and read:
            self.shown, rate = now, read / (now - self.begun)
            write_log(f"loading: {read / 1e6:.0f} of {self.total / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s, "
                      f"{(self.total - read) / rate:.0f} s left")


@functools.cache
def sample_database(version: str) -> sqlite3.Connection:
    """The sample records in memory, made once in a process. Servers copy it."""
    store = Store(None, RECORD_SCHEMA)
    atexit.register(store.close)
    with store.transaction() as database:
        database.execute("INSERT INTO record_facts VALUES ('version', ?), ('samples', 'yes')", (version,))
        for resource in sample_resources(version):
            _write(database, None, prepare(resource, version))
        place_provenances(database)
    return store.connection


class EmbeddedRecords(Records):
    """FHIR resources of one version in SQLite.

    Theory of operation of the pages. The link to the next page carries a mark: the sort keys and id of the
    last entry shown. Not how many came before: what is loaded meanwhile would shift others over the edge, to
    be shown twice or never. Nor its number: these run through all records, and gaps would count what others
    have. SQL finds what matches, `Access` judges each. A page shorter for what may not be seen would tell how
    many hidden resources match, and question by question what they hold. So it is filled until one more is
    seen, the total is not told, and the mark is of an entry that was shown. An app that makes up a mark
    chooses where to begin, and that is all.

    What we would like better: the time of a page still tells a little; where nothing may be seen all matches
    are looked at in one request; each page of a sorted search works out all keys anew.
    """
    has_accounts = True

    def __init__(self, settings: Settings, clock: Clock):
        """Open them and load what --data names, or StartError; `warnings` tell what was left out."""
        self.version, self.clock = settings.fhir_version, clock
        self.served = search_table(self.version)
        self.store = Store(settings.db, RECORD_SCHEMA)
        self.store.connection.create_function("words", 2, words_in)
        self.warnings: list[str] = []
        self._in_memory = settings.db is None
        self._samples = "clinician" if "none" in settings.data else "yes"  # her account is there without, too
        self._ready, self._filling = False, threading.Lock()
        try:
            with self.store.transaction() as database:
                database.execute("INSERT OR IGNORE INTO record_facts VALUES ('version', ?)", (self.version,))
            kept = self._fact("version")
            if kept != self.version:
                raise StartError(f"--db {settings.db} holds {kept} records: "
                                 f"start with --fhir-version {kept}, or name another file")
            given = [source for item in settings.data if item != "none" for source in sources(item)]
            if given:
                before = self._filled().rows("SELECT coalesce(max(number), 0) FROM resources")[0][0]
                load = Load(self, later=False)
                load.sources(given)
                self.warnings += load.warnings(before)
        except BaseException as error:
            self.store.close()
            if isinstance(error, (sqlite3.Error, PortalError)):
                raise StartError(f"--db {settings.db}: {error}; name a file that can be written")
            raise

    def _fact(self, name: str) -> str:
        """What the database says about itself; "" if nothing."""
        row = self.store.row("SELECT value FROM record_facts WHERE name = ?", name)
        return row["value"] if row else ""

    def _filled(self) -> Store:
        """The store with the sample records in it: put there on first use, so that a start need not wait."""
        if not self._ready:
            with self._filling:
                if not self._ready and self._fact("samples") not in (self._samples, "yes"):
                    self._fill(sample_database(self.version))
                self._ready = True
        return self.store

    def _fill(self, samples: sqlite3.Connection) -> None:
        """Copy the sample records in."""
        if self._in_memory and self._samples == "yes":
            samples.backup(self.store.connection)
            self.store.forget_rows()
            return
        with self.store.transaction() as database:
            texts = samples.execute("SELECT json FROM resources WHERE ? = 'yes' OR id = 'smart-clinician' "
                                    "ORDER BY number", (self._samples,)).fetchall()
            Load(self, later=False).put(prepare(json.loads(text), self.version) for (text,) in texts)
            place_provenances(database)
            database.execute("INSERT OR REPLACE INTO record_facts VALUES ('samples', ?)", (self._samples,))

    def load(self, document: Json) -> int:
        """Add or replace a resource, or those of a Bundle, all or none; gives how many.
        PortalError if it is not FHIR of this version, or nothing of it is served."""
        self._filled()
        load = Load(self, later=True)
        prepared = list(load.prepared(parse_document(document)))
        need(prepared or not load.skipped,
             f"{', '.join(load.skipped)}: not served; these are {', '.join(sorted(self.served))}")
        with self.store.transaction() as database:
            load.put(prepared)
            load.resolve(prepared)
            place_provenances(database, provenances_of(database, load.written))
        return len(prepared)

    def reset(self) -> None:
        """As at the start: what `load` added is gone, what it replaced is back, in its old place."""
        with self.store.transaction() as database:
            before = database.execute("SELECT number, json FROM before_load").fetchall()
            provenances = provenances_of(database, [number for number, _ in before])
            load = Load(self, later=False)
            for number, text in before:
                if text is None:
                    _erase(database, number)
                else:
                    resource = json.loads(text)
                    _write(database, number, prepare(resource, self.version, "", load.point(resource, None)))
            place_provenances(database, provenances)
            database.execute("DELETE FROM before_load")

    def find(self, type_name: str, resource_id: str) -> StoredResource | None:
        """One resource, or None."""
        row = self._filled().row("SELECT * FROM resources WHERE type = ? AND id = ?", type_name, resource_id)
        return StoredResource(row, self) if row else None

    def _select(self, sql: str, *values: Any) -> list[StoredResource]:
        """The resources that some SQL after SELECT finds."""
        return [StoredResource(row, self) for row in self._filled().rows("SELECT " + sql, *values)]

    def find_patients(self, text: str = "", limit: int = 200) -> list[tuple[str, str]]:
        """(id, name) of patients, by id; with a text, of those who have all its words in name or id."""
        words = fold(text).split()
        has_word = (" AND (instr(lower(r.id), ?) OR EXISTS (SELECT 1 FROM search_values "
                    "WHERE number = r.number AND parameter = 'name' AND instr(value, ?)))")
        sql = f"* FROM resources r WHERE type = 'Patient'{has_word * len(words)} ORDER BY patient_id LIMIT ?"
        patients = self._select(sql, *(value for word in words for value in (word, word)), limit)
        return [(str(patient.id), display_name(patient.content)) for patient in patients]

    def pointing_to(self, binary_id: str) -> Sequence[Resource]:
        """The DocumentReferences and DiagnosticReports whose content is a Binary."""
        return self._select("* FROM resources WHERE number IN (SELECT number FROM search_values "
                            "WHERE parameter = '_attachment' AND value = ? AND system = 'Binary')", binary_id)

    def search(self, query: Query, access: Access) -> Page:
        """A page of what matches and may be seen, sorted as asked, else by patient, and then by id."""
        where = search_condition(query, access.patients(query.type, "s"))
        sort = [(self._sort_key(query.type, *key), key[1]) for key in query.sort] or [("r.patient_id", False)]
        columns = "".join(f", {sql} AS key{place}" for place, (sql, _) in enumerate(sort))
        keys = [*((f"key{place}", falling) for place, (_, falling) in enumerate(sort)), ("id", False)]
        select = Sql(f"SELECT r.*{columns} FROM resources r WHERE {where.sql}", where.values)
        page = self._page(select, keys, query.limit, query.after, access.may_see, "s")
        total = len(page.matches) if query.total and not page.hidden and not access.narrowed else None
        if total is not None and (not query.limit or page.next or query.after):  # this page is not all
            sql = f"SELECT count(*) FROM resources r WHERE {where.sql}"
            total = self._filled().rows(sql, *where.values)[0][0]
        return page._replace(included=self._included(query, page.matches, access), total=total)

    def _page(self, select: Sql, keys: Sequence[tuple[str, bool]], count: int, after: Sequence[Any],
              may_see: Callable[[StoredResource, str], bool], letters: str) -> Page:
        """A page of what `select` finds and may be seen, by its `keys` (name, falling)."""
        _check(len(after) in (0, len(keys)), "_page: not a link of this search")
        seen: list[StoredResource] = []
        hidden, wanted, last = False, count + 1, None
        while wanted > 1 and len(seen) <= count:  # until the page is full and one more is seen
            looked_at = 0
            for looked_at, last in enumerate(self._in_order(select, keys, after, wanted), 1):
                if may_see(last, letters):
                    seen.append(last)
                else:
                    hidden = True
                if len(seen) > count:
                    break
            # Each time many more, so that what is hidden is sorted a few times over, however much it is.
            wanted = max(500, 8 * wanted) if looked_at == wanted else 0
            after = [last.row[name] for name, _ in keys] if last else []
        mark = page_mark([seen[count - 1].row[name] for name, _ in keys]) if len(seen) > count > 0 else ""
        return Page(seen[:count], mark, hidden)

    def _in_order(self, select: Sql, keys: Sequence[tuple[str, bool]], after: Sequence[Any],
                  limit: int) -> Iterator[StoredResource]:
        """What `select` finds `after` a row, by its keys. Of many only the numbers are sorted and kept."""
        rest = _comes_after(keys, after) if after else Sql("1")
        order = ", ".join(f"{name} DESC" if falling else name for name, falling in keys)
        sql = f"FROM ({select.sql}) WHERE {rest.sql} ORDER BY {order} LIMIT ?"
        values = (*select.values, *rest.values, limit)
        if limit <= 1001:
            yield from self._select(f"* {sql}", *values)
            return
        numbers = [row["number"] for row in self.store.rows(f"SELECT number {sql}", *values)]
        for some in (numbers[start:start + 500] for start in range(0, len(numbers), 500)):
            found = {match.number: match for match in self._select(
                f"* FROM ({select.sql}) WHERE number IN ({_marks(some)})", *select.values, *some)}
            yield from (found[number] for number in some if number in found)

    def _sort_key(self, type_name: str, name: str, falling: bool) -> str:
        """What _sort looks at, as SQL: of several values the first in its direction. No value comes last."""
        kind = self.served[type_name][name].kind
        if kind in _OWN_COLUMNS:
            return next(iter(_OWN_COLUMNS[kind].values()))
        column = "first" if kind in ("date", "quantity") else "value"
        first, last = ("max", "-1e308") if falling else ("min", "char(1114111)")
        # The name is one of our table's, so it may stand in SQL.
        return (f"coalesce((SELECT {first}({column}) FROM search_values WHERE number = r.number "
                f"AND parameter = '{name}'), {last})")

    def _included(self, query: Query, matches: Sequence[StoredResource],
                  access: Access) -> list[StoredResource]:
        """What _include and _revinclude add to a page: each once, and only what may be seen itself."""
        known = {match.number for match in matches}
        included: list[StoredResource] = []
        for include, match in itertools.product(query.includes, matches):
            for other in self._other_ends(include, match, access):
                if other.number not in known and access.may_see(other, "s"):
                    known.add(other.number)
                    included.append(other)
            _check(len(included) <= MAX_INCLUDED, f"more than {MAX_INCLUDED} resources would be included; "
                   "ask for fewer matches with _count", "too-costly")
        return included

    def _other_ends(self, include: Include, match: StoredResource, access: Access) -> list[StoredResource]:
        """The resources that refer to a match (_revinclude), or that it refers to (_include). Of the former,
        which may be many, only so many as may be seen: those hidden must not take their places."""
        source, parameter = include.source, include.parameter
        names_owner = self.served[source][parameter].kind == "owner"
        if include.reverse:
            sql, values = "type = ? AND patient_id = ?", [source, match.id]
            if not names_owner:
                form = match.content if match.type == "Questionnaire" else {}
                sql = ("+type = ? AND number IN (SELECT number FROM search_values WHERE value IN (?, ?) "
                       "AND parameter = ? AND system IN (?, '', ?))")
                values += [str(form.get("url")), parameter, match.type, f"|{form.get('version')}"]
            patients = access.patients(source, "s")
            if not isinstance(patients, Everybody):  # a doctor has many patients
                sql += f" AND +patient_id IN ({_marks([NOBODY, *patients])})"
                values += [NOBODY, *patients]
            select = Sql(f"SELECT * FROM resources WHERE {sql}", tuple(values))
            return self._page(select, [("number", False)], MAX_INCLUDED + 1, (), access.may_see, "s").matches
        targets: Sequence[Any] = [("Patient", match.owner)]
        if not names_owner:
            sql = "SELECT system, value FROM search_values WHERE number = ? AND parameter = ?"
            targets = self.store.rows(sql, match.number, parameter)
        found = [other for target in targets for other in self._named(*target)]
        return [other for other in found if include.target in ("", other.type)]

    def _named(self, system: str, value: str) -> list[StoredResource]:
        """What a reference or canonical names: see references_in. Of a canonical without a version, all."""
        if system[:1] not in ("", "|"):
            return self._select("* FROM resources WHERE type = ? AND id = ?", system, value)
        return self._select("r.* FROM resources r JOIN search_values USING (number) WHERE parameter = 'url' "
                            "AND value = ? AND ? IN ('', (SELECT value FROM search_values WHERE number = "
                            "r.number AND parameter = 'version'))", value, system[1:])

    def check_type(self, asked: FhirRequest) -> None:
        """See Records."""
        if asked.type not in self.served:
            known = ", ".join(sorted(self.served))
            raise FhirError("not-supported", f"{asked.type}: not a type that is served: {known}", 404)

    def answer(self, asked: FhirRequest) -> Response:
        """See Records."""
        if asked.interaction == "read":  # by far the most of them
            return self.answer_read(asked)
        return cast(Response, getattr(self, f"answer_{asked.interaction}")(asked))

    def visible(self, asked: FhirRequest) -> StoredResource:
        """One resource: fetched, then judged."""
        resource = self.find(asked.type, asked.id)
        if not resource or not asked.access.may_see(resource, "r"):
            raise not_in_record(asked)
        return resource

    def answer_read(self, asked: FhirRequest) -> Response:
        """One resource; 304 if the client has it."""
        resource, request = self.visible(asked), asked.request
        need(asked.version in ("", resource.version), "only the current version of a resource is kept: "
             "[type]/[id]/_history/[version]", "not-found", 404, FhirError)
        tag = f'"{resource.version}"'
        headers = [("ETag", f"W/{tag}"), ("Last-Modified", http_date(resource.updated))]
        text = "" if is_unchanged(request, tag, resource.updated) else resource.text
        return one_resource(asked, text, headers, self.version)

    def answer_search(self, asked: FhirRequest) -> Response:
        """A page of a type's resources that match and may be seen, with a link to the next (FHIR search)."""
        request, pin = asked.request, []
        if asked.compartment:  # the path of a compartment is a search in it (FHIR search, "Compartments")
            owners = [name for name, (kind, _) in self.served[asked.type].items() if kind == "owner"]
            need(owners, f"{asked.type} is in no patient's compartment", "not-supported", 404, FhirError)
            pin = [(owners[0], asked.compartment)]
        pairs = tuple((name, value) for name, value in [*pin, *request.pairs()] if value)
        lenient = "handling=lenient" in request.headers.get("prefer", "").replace(" ", "")
        query = parse_query(self.version, asked.type, pairs, asked.base, lenient)
        allowed = asked.access.patients(asked.type, "s")
        others = [patient for patient in sorted(query.patients()) if patient not in allowed]
        permit(not others, f"{', '.join(others)}: the token is not for this patient's record")
        page = self.search(query, asked.access)
        request.note(f"{len(page.matches)} entries, and {len(page.included)} that they lead to, each "
                     "judged: patient, scope, category")
        return bundle_response(asked, page, query.parameters, asked.type, self.version)

    def answer_everything(self, asked: FhirRequest) -> Response:
        """A page of a patient's compartment, and what it refers to that is nobody's; all of it judged."""
        self.visible(asked)
        pairs = asked.request.pairs()
        types, times = everything_asked(pairs)
        types = types or set(self.served)
        shown = [pair for pair in pairs if pair[0] not in ("_type", *times)]
        query = parse_query(self.version, "Patient", (("_count", "1000"), *shown))
        since, start, end = times["_since"][0], times["start"][0], times["end"][1]
        nobodys, find = types & {"Device", *SHARED_TYPES}, functools.cache(self.find)
        # What is nobody's is found by what refers to it, of whatever type that is.
        looked_at = set(self.served) if nobodys else types & self.served.keys()

        def led_to(resource: StoredResource) -> list[StoredResource]:
            targets = [target for target in _RELATIVE_IN_JSON.findall(resource.text) if target[0] in nobodys]
            return [other for other in itertools.starmap(find, targets) if other and other.owner == NOBODY
                    and other.updated >= since and asked.access.may_see(other, "rs")]

        def has_place(resource: StoredResource, letters: str) -> bool:  # others would leave pages empty
            may_see = asked.access.may_see(resource, letters)
            return may_see and (resource.type in types or bool(led_to(resource)))

        sql = (f"SELECT * FROM resources r WHERE type IN ({_marks(looked_at)}) AND patient_id = ? "
               f"AND updated >= ? AND {CARE_DATES}")
        select = Sql(sql, (*looked_at, asked.id, since, end, start))
        keys = [("type", False), ("id", False)]
        page = self._page(select, keys, query.limit, query.after, has_place, "rs")
        included = {other.number: other for match in page.matches for other in led_to(match)}
        matches = [match for match in page.matches if match.type in types]
        page = page._replace(matches=matches, included=list(included.values()))
        return bundle_response(asked, page, pairs, f"Patient/{asked.id}/$everything", self.version)

    def answer_create(self, asked: FhirRequest) -> Response:
        """All in one transaction: judged is what lies there before, and what would after it. An absolute
        reference is local below our own base; any other stays as it is, whatever is loaded later."""
        resource, load = sent_resource(asked, self.version), Load(self, later=True)
        fhir_type(asked.request, self.version)  # or 406
        text, base = _ENCODER.encode(resource), json.dumps(asked.base)[1:-1]
        for local in ('"reference":"', '"url":"Binary/'):
            text = text.replace(local.replace(':"', f':"{base}/'), local)
        resource, meta = json.loads(text), resource.get("meta", {})
        self._filled()
        with self.store.transaction() as database:
            permit(asked.request.era == self.era, "everything was reset meanwhile, with this token")
            check_pointers(self, asked, resource, abroad=False)
            stored = self.find(asked.type, asked.id) if asked.id else None
            before = stored.version if stored else "0"
            number = str(int(before) + 1) if before.isdecimal() else "1"
            now, key = self.clock.now(), asked.id or new_token()
            meta = {**meta, "versionId": number, "lastUpdated": instant(now)}
            new = prepare({**resource, "id": key, "meta": meta}, self.version)
            was = stored.content.get("identifier") if stored else resource
            load.by_app = 1 if was == resource.get("identifier") else 2
            load.put([new])
            place_provenances(database, load.written)
            judge_write(self, asked, cast(Resource, self.find(asked.type, key)), stored, f'"{before}"')
        headers = [("Location", f"{asked.base}/{asked.type}/{key}/_history/{number}"),
                   ("ETag", f'W/"{number}"'), ("Last-Modified", http_date(now))]
        return fhir_response(asked.request, new.row[-1], 200 if stored else 201, headers, self.version)

    answer_update = answer_create

    def describe(self, statement: Json, secured: bool) -> None:
        """See Records."""
        statement["rest"][0]["resource"] = [self._describe_type(name, secured)
                                            for name in sorted(self.served)]
        describe_everything(statement["rest"][0], self.version)
        if self.version == "r4":
            describe_profiles(statement)

    def _describe_type(self, name: str, secured: bool) -> Json:
        """What a CapabilityStatement says of a type. An empty list is left out (FHIR has none)."""
        interactions = [{"code": code} for code in interactions_with(name, secured)]
        if name == "Binary":
            return {"type": name, "interaction": interactions}
        known = sorted(self.served[name].items())
        named = [word for word, parameter in known if parameter.type == "reference"]
        described = {
            "type": name, "interaction": interactions,
            "searchInclude": [f"{name}:{word}" for word in ["*", *named] if named],
            "searchRevInclude": sorted(map(":".join, referring(name, self.version))),
            "searchParam": [{"name": word, "type": parameter.type} for word, parameter in known]}
        return {member: value for member, value in described.items() if value}

    def patient_name(self, patient_id: str) -> str | None:
        """See Records."""
        patient = self.find("Patient", patient_id)
        return display_name(patient.content) if patient else None

    def birth_dates(self, patient_ids: list[str]) -> dict[str, str]:
        """See Records."""
        patients = [self.find("Patient", patient_id) for patient_id in patient_ids]
        return {str(patient.id): str(patient.content.get("birthDate", "")) for patient in patients if patient}

    def visits(self, patient_id: str) -> list[Json]:
        """See Records."""
        query = parse_query(self.version, "Encounter", (("patient", patient_id), ("_count", "100")))
        return [resource.content for resource in self.search(query, OPEN_ACCESS).matches]

    def close(self) -> None:
        """See Records."""
        self.store.close()


class Load:
    """Resources on their way into the records; what comes `later` than the start, reset takes back. `put` and
    `resolve` are called within a transaction."""
    def __init__(self, records: EmbeddedRecords, later: bool):
        self.store, self.database, self.later = records.store, records.store.connection, later
        self.version, self.served, self.clock = records.version, records.served, records.clock
        self.skipped: collections.Counter[str] = collections.Counter()  # types that aren't served
        self.written: list[int] = []  # the numbers of what came later than the start
        self.by_app = 0  # before_load.written
        self.left_out: set[str] = set()  # files of folders that hold something else than FHIR

    def sources(self, given: Sequence[Source]) -> None:
        """Load one after the other: a bad one is refused whole, those before it stay."""
        progress, begin = Progress(sum(source.size for source in given), self.clock), 0
        for source in given:
            try:
                with self.store.transaction():
                    for place, document, read in source.documents():
                        progress.at(begin + read)
                        if source.is_chosen or says_it_is_fhir(document):
                            self.put(self.prepared(document, place))
                        else:
                            self.left_out.add(source.path)
            except (PortalError, OSError, EOFError, zlib.error) as error:
                reason = error.description if isinstance(error, PortalError) else error
                raise StartError(f"--data {source.path}: {reason}")
            begin += source.size
        with self.store.transaction():
            self.resolve()
            place_provenances(self.database)

    def prepared(self, document: Any, place: str = "") -> Iterator[Prepared]:
        """The resources of a document, ready to be written. What isn't served is counted and left out."""
        now, where = instant(self.clock.now()), ""
        try:
            resources, names = unbundle(document)
            for where, resource in resources:
                type_name = resource["resourceType"]
                is_served = type_name in self.served  # of what isn't, only the type is judged
                check_version(resource if is_served else {"resourceType": type_name}, self.version)
                if not is_served:
                    self.skipped[type_name] += 1
                    continue
                yield prepare(resource, self.version, now, self.point(resource, names))
        except PortalError as error:
            raise PortalError(error.error, f"{place}{where}{error.description}")

    def put(self, resources: Iterable[Prepared]) -> None:
        """Write resources."""
        for new in resources:
            number = _write(self.database, None, new)
            if not number:
                self._renew(new)
            elif self.later:
                self.written.append(number)
                self.database.execute("INSERT INTO before_load VALUES (?, NULL, ?)", (number, self.by_app))

    def _renew(self, new: Prepared) -> None:
        """Replace a resource, unless the new one says the same but for the meta that we gave it."""
        sql = "SELECT number, json FROM resources WHERE type = ? AND id = ?"
        number, text = self.database.execute(sql, new.row[:2]).fetchone()
        was = json.loads(text)
        kept = {name: was["meta"][name] for name in ("versionId", "lastUpdated")}
        if {**new.resource, "meta": {**kept, **new.given}} == was:
            return
        if not self.later and self.database.execute(
                "UPDATE before_load SET json = ? WHERE number = ?", (new.row[-1], number)).rowcount:
            return  # what was loaded or written later than a start stands, until a reset
        if "versionId" not in new.given and kept["versionId"].isdecimal():
            new.resource["meta"]["versionId"] = str(int(kept["versionId"]) + 1)
            new = prepare(new.resource, self.version, "", new.unresolved)
        self.replace(number, text, new)

    def replace(self, number: int, text: str, new: Prepared) -> None:
        """Write a resource in another's place; `text`, the one before, is what reset brings back."""
        if self.later:
            self.written.append(number)
            self.database.execute(
                "INSERT INTO before_load VALUES (?, ?, ?) ON CONFLICT (number) DO UPDATE SET written = "
                "max(written, excluded.written) * (excluded.written > 0)", (number, text, self.by_app))
        else:
            self.database.execute("DELETE FROM before_load WHERE number = ?", (number,))
        _write(self.database, number, new)

    def resolve(self, new: Sequence[Prepared] | None = None) -> None:
        """Make open references Type/id where that is known: all, or those in `new` resources and to these."""
        sql = "SELECT number FROM unresolved"
        asked: list[tuple[str, tuple[str, ...]]] = [(sql, ())] if new is None else []
        for resource in new or ():
            asked += [(f"{sql} WHERE reference = ?", (name,)) for name in resource.names()]
            if resource.unresolved:
                its_own = f"{sql} JOIN resources USING (number) WHERE type = ? AND id = ?"
                asked.append((its_own, resource.row[:2]))
        names: dict[str, str | None] = {}
        for number in dict.fromkeys(number for query in asked for (number,) in self.database.execute(*query)):
            waiting = self.database.execute("SELECT reference FROM unresolved WHERE number = ?", (number,))
            known = [self.resolve_reference(reference, names) for (reference,) in waiting.fetchall()]
            if any(known):
                sql = "SELECT json FROM resources WHERE number = ?"
                (text,) = self.database.execute(sql, (number,)).fetchone()
                resource = json.loads(text)
                self.replace(number, text, prepare(resource, self.version, "", self.point(resource, names)))

    def point(self, resource: Json, names: dict[str, str | None] | None) -> set[str]:
        """Make references, and addresses of attachments, say Type/id where that is what they mean; without
        `names` that is not asked. Gives those that wait for it; of an absolute one, anyone's, its end."""
        waiting = set[str]()
        for holder in values_within(resource):
            for key in ("reference", "url") if isinstance(holder, dict) else ():
                text = holder.get(key)
                if not isinstance(text, str) or (key == "url" and ("resourceType" in holder or (
                        text.startswith("http") and "/Binary/" not in text))):
                    continue  # such as a Questionnaire's url: its own name, not an address
                if text.startswith(("urn:", "http")) or "?" in text or text in (names or ()):
                    match = _ABSOLUTE.fullmatch(text)
                    if meant := names is not None and self.resolve_reference(text, names):
                        holder[key] = meant
                    elif match and match[1] in self.served:
                        waiting.add(f".../{match[1]}/{match[2]}")
                    elif key == "reference" and not text.startswith("http"):
                        waiting.add(unquote(text))
        return waiting

    def resolve_reference(self, reference: str, names: dict[str, str | None]) -> str | None:
        """The Type/id that a reference means, or None: by `names` (what a Bundle's fullUrls mean, and what
        was looked up before), else by what is in the records."""
        if reference not in names:
            rows = self._meant_by(reference)
            names[reference] = f"{rows[0]['type']}/{rows[0]['id']}" if len(rows) == 1 else None
        return names[reference]

    def _meant_by(self, reference: str) -> Sequence[Row]:
        """What Type?search finds, which must be one (FHIR, transaction); what has urn:uuid:'s id; or what an
        absolute reference names: all that is loaded is one server's, whatever its name. What an app wrote is
        found by an identifier that it left alone, or not: it could take another's, and what comes for it."""
        type_name, conditional, search = reference.partition("?")
        select = "SELECT type, id FROM resources r WHERE"
        if absolute := _ABSOLUTE.fullmatch(reference):
            return self.store.rows(f"{select} type = ? AND id = ?", *absolute.groups())
        if reference.startswith("urn:"):
            return self.store.rows(f"{select} type IN ({_marks(self.served)}) AND id = ?",
                                   *self.served, reference.rpartition(":")[2])
        if conditional and type_name in self.served:
            with contextlib.suppress(FhirError, ValueError):
                query = parse_query(self.version, type_name, tuple(parse_qsl(search)))
                where = search_condition(query, EVERYBODY)
                loaded = "number NOT IN (SELECT number FROM before_load WHERE written >= ?)"
                level = 2 if re.fullmatch("identifier=[^&]*", search) else 1
                return self.store.rows(f"{select} {where.sql} AND {loaded} LIMIT 2", *where.values, level)
        return ()

    def warnings(self, before: int) -> Iterator[str]:
        """What was left out; after number `before`, what no patient will read and what leads nowhere."""
        if self.left_out:
            yield (f"{len(self.left_out)} files were left out, hidden in a folder or without a resourceType, "
                   f"such as {min(self.left_out)}")
        unread = {row[0]: row[1] for row in self.store.rows(  # (a Binary is read where its document is)
            "SELECT type, count(*) FROM resources r WHERE number > ? AND patient_id != '' AND NOT EXISTS "
            "(SELECT 1 FROM resources WHERE type = 'Patient' AND id = r.patient_id) AND NOT (type = 'Binary' "
            "AND EXISTS (SELECT 1 FROM search_values WHERE parameter = '_attachment' AND value = r.id "
            "AND system = 'Binary')) GROUP BY type", before)}
        for what, counts in (("of types that are not served were left out", self.skipped),
                             ("belong to no patient who is known", unread)):
            if counts:
                yield (f"{sum(counts.values())} resources {what}: "
                       + ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())))
        count, example = self.store.rows(
            "SELECT count(*), min(reference) FROM (SELECT reference FROM unresolved UNION ALL "
            "SELECT system || '/' || value FROM search_values WHERE number > ? AND parameter != '_attachment'"
            f" AND system IN ({_marks(self.served)}) AND NOT EXISTS "
            "(SELECT 1 FROM resources WHERE type = system AND id = value))", before, *self.served)[0]
        if count:
            yield f"{count} references lead to nothing that was loaded, such as {example}; they were kept"


# ######################################################################## 19 a FHIR server behind

MAX_ANSWER = 64 << 20        # bytes of an answer, unpacked
MAX_INTERIM = 100            # 1xx answers before the answer
MAX_LINKS = 1000             # paging links that one authorization may hold
PAGE_SECONDS = 3600
MAX_PAGES = 20               # read for one request: in search of a Binary's document, or of what may be seen
Pairs = list[tuple[str, str]]  # names and values of a query or form
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n]*)?\r?\n")


class Answer(NamedTuple):
    """What the FHIR server answered."""
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes
    url: str                 # asked last, after redirects


class StaleConnection(Exception):
    """A kept-alive connection that the FHIR server closed before it saw the request."""


class Connection:
    """A connection to another server, kept alive. It reads answers strictly (RFC 9112 section 6.3) and
    leanly: http.client's use of email.parser takes longer than all the rest of a forwarded read."""
    def __init__(self, https: bool, host: str, addresses: Sequence[tuple[str, int]], deadline: float,
                 sockets: OpenSockets, most: int):
        """Connect to the first of the addresses that takes it. No answer may be longer than `most` bytes."""
        self.sockets, self.most = sockets, most
        self.used = self.reusable = False
        self.socket = connect_to_first(addresses, deadline - time.monotonic())
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if https:
            import ssl  # takes long to import, and few need it
            self.socket = ssl.create_default_context().wrap_socket(self.socket, server_hostname=host,
                                                                   do_handshake_on_connect=False)
        self.timed = TimedSocket(self.socket, deadline)
        self.stream = io.BufferedReader(self.timed, 64 << 10)
        sockets.add(self.timed)
        try:
            if https:
                self.timed.handshake()
        except BaseException:
            self.close()
            raise

    def exchange(self, message: bytes, url: str, deadline: float) -> Answer:
        """Send a request, read its answer. StaleConnection where a used connection gives no sign of life."""
        self.timed.deadline, self.reusable, alive = deadline, False, b""
        try:
            self.timed.send(message)
            alive = self.stream.peek(1)
        except ConnectionError:
            pass
        if not alive:
            closed = BadRequest(400, "it closed the connection without an answer")
            raise StaleConnection if self.used else closed
        self.used = True
        version, status, headers = self._read_head()
        announced = "content-length" in headers or "transfer-encoding" in headers
        has_body, body = status not in (204, 304), b""
        if has_body and announced:
            body = read_body(self.stream, headers, self.most)
        elif has_body:  # up to the end of the connection
            body = self.stream.read(self.most + 1)
            if len(body) > self.most:
                raise too_large(self.most)
        # A server that announces a body where there is none may send it all the same.
        self.reusable = (version == b"1" and "close" not in headers.get("connection", "").lower()
                         and announced == has_body)
        coding = headers.get("content-encoding", "identity").lower()
        return Answer(status, headers, unpacked(body, coding, self.most), url)

    def _read_head(self) -> tuple[bytes, int, dict[str, str]]:
        """HTTP's minor version, status and headers of the answer, past the interim ones (1xx)."""
        for _ in range(MAX_INTERIM + 1):
            match = _STATUS_LINE.fullmatch(self.stream.readline(MAX_HEAD))
            if not match:
                raise BadRequest(400, "its first line is not HTTP")
            status, headers = int(match[2]), read_headers(self.stream, MAX_HEAD)
            if status >= 200:
                return match[1], status, headers
        raise BadRequest(400, f"it has no end of interim answers ({status})")

    def is_quiet(self) -> bool:
        """Whether nothing came since the last answer: no byte too many, no 408 to nothing, no body of a 304,
        not the end. Else it would be taken for the next answer: somebody would get what another asked for."""
        if sys.platform == "linux":  # asked this way, Python hands nothing over to another thread
            with contextlib.suppress(OSError):
                info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                # tcpi_state is TCP_ESTABLISHED; all of tcpi_bytes_received was read (never so with TLS).
                if info[0] == 1 and int.from_bytes(info[128:], sys.byteorder) == self.stream.tell():
                    return True
        self.timed.deadline = DO_NOT_WAIT
        try:
            return self.stream.read(1) is None
        except OSError:
            return False

    def close(self) -> None:
        """Close the connection."""
        self.sockets.discard(self.timed)
        self.socket.close()


def connect_to_first(addresses: Sequence[tuple[str, int]], seconds: float) -> socket.socket:
    """A connection to the first of these addresses that takes one, all tried within so many seconds."""
    failure = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection(address, max(seconds / len(addresses), 0.001))
        except OSError as error:
            failure = error
    raise failure


def unpacked(body: bytes, coding: str, most: int) -> bytes:
    """A body without its gzip, of one or more parts (RFC 1952 section 2.2), and so many bytes at most."""
    if coding == "identity":
        return body
    if coding not in ("gzip", "x-gzip"):
        raise BadRequest(400, "its Content-Encoding was not asked for")
    text = b""
    with contextlib.suppress(zlib.error):
        for _ in range(100):  # more would take long, however little is in them
            unpack = zlib.decompressobj(31)  # 31: with gzip's header
            text += unpack.decompress(body, most + 1 - len(text))
            if len(text) > most:
                raise too_large(most)
            body = unpack.unused_data
            if unpack.eof and not body:
                return text
    raise BadRequest(400, "its gzip is broken")


def refused(description: str, status: int = 502, headers: Headers = (), words: str = "") -> FhirError:
    """The FHIR server's fault, in our words: its own, for the log alone, might name its address, or somebody
    else's record."""
    description = f"the FHIR server behind this portal {description}"
    error = FhirError(ISSUE_CODES.get(status, "exception"), description, status, headers)
    error.aside = words and f"; it says: {excerpt(words)}"
    return error


_COLON, _SLASH = "(?::|%3[Aa])", r"(?:\\?/|%2[Ff])"  # as they stand in JSON, and in an address's parameters
NOWHERE = "https://fhir-server.invalid"  # put where a trace of the server was (RFC 6761 section 6.4)
_ESCAPED_ASCII = re.compile(r"\\u00[2-7]")
_SEPARATOR = re.compile(r"[ \t\n\r]*([,:{}\[\]])[ \t\n\r]*")
T = TypeVar("T")


def _step(text: str, at: int, expected: str) -> tuple[str, int]:
    """Past one of JSON's structural characters; ValueError if it isn't one of those expected."""
    match = _SEPARATOR.match(text, at)
    if not match or match[1] not in expected:
        raise ValueError(f"expected {expected}")
    return match[1], match.end()


def split_bundle(text: str, judge: Callable[[Any, str], T]) -> tuple[Json, list[T]]:
    """A Bundle's own members, and what `judge` makes of each of its entries and the text it came in. That is
    sent on as it is: a decimal's trailing zeros survive. ValueError if it is no JSON object."""
    own: Json = {}
    judged: list[T] = []
    mark, at = _step(text, 0, "{")
    while mark != "}":
        if not text.startswith('"', at):
            raise ValueError("expected a member's name")
        name, at = _JSON.raw_decode(text, at)
        at = _step(text, at, ":")[1]
        if name != "entry":
            own[name], at = _JSON.raw_decode(text, at)
        else:
            mark, at = _step(text, at, "[")
            if text.startswith("]", at):
                mark, at = "]", at + 1
            while mark != "]":
                value, end = _JSON.raw_decode(text, at)
                judged.append(judge(value, text[at:end]))
                mark, at = _step(text, end, ",]")
        mark, at = _step(text, at, ",}")
    if at < len(text):
        raise ValueError("text after the end")
    return own, judged


class Patience(threading.local):
    """How long a thread waits for the FHIR server: for one request of an app, --fhir-timeout from the first
    question on, however many there are; else (a control, a start) as long for each."""
    def __init__(self, seconds: float):
        self.seconds, self.until = seconds, NO_DEADLINE

    def __enter__(self) -> None:
        self.until = 0.0  # set by the first question

    def __exit__(self, *error: object) -> None:
        self.until = NO_DEADLINE

    def deadline(self, share: float) -> float:
        """Of an answer that may take this share of the time that is left."""
        now = time.monotonic()
        self.until = self.until or now + self.seconds
        return now + min(self.until - now, self.seconds) * share


class Upstream:
    """The FHIR server behind: asks it, and knows its addresses, so that none gets out. The environment's
    proxies are not used: they would be asked for a test's server on loopback."""
    def __init__(self, settings: Settings, sockets: OpenSockets):
        import urllib.request  # takes long to import, and few need it
        self.base, self.sockets = settings.fhir_server or "", sockets
        self.patience = Patience(settings.fhir_timeout)
        parts = urlsplit(self.base)
        self.origin, self.path = f"{parts.scheme}://{parts.netloc}", parts.path
        self.https = parts.scheme == "https"
        self.host, self.port = parts.hostname or "", parts.port or (443 if self.https else 80)
        # DSTU2's media type is another: asking for either spares asking for the version first.
        self.headers = "".join(f"{header}\r\n" for header in (  # sent with every request
            f"Host: {parts.netloc}",
            "Accept: application/fhir+json, application/json+fhir;q=0.9, application/json;q=0.8",
            f"Accept-Encoding: {'identity' if is_this_machine(self.host) else 'gzip'}",
            *settings.fhir_header))
        self._learning = threading.Lock()
        self.forget()
        self._idle: list[Connection] = []
        send = self._send

        class KeepAlive(urllib.request.BaseHandler):
            """Opens addresses over connections that are kept."""
            def default_open(self, request: urllib.request.Request) -> Answer:
                """What the opener calls, whatever the scheme."""
                return send(request)

        # With no other handler: none that follows redirects or proxies by itself, none that opens files.
        self._request, self._opener = urllib.request.Request, urllib.request.OpenerDirector()
        self._opener.add_handler(KeepAlive())

    def forget(self) -> None:
        """Forget what was found out of the server's names and abilities."""
        with self._learning:
            self._spell([])
        self._statement: tuple[Json, float] = ({}, 0.0)  # the CapabilityStatement; until when it is fresh

    def ask(self, url: str, headers: Mapping[str, str] = {}, body: bytes | None = None,
            share: float = 1.0, writes: str = "") -> Answer:
        """GET an address below the base, or POST a form to it; `writes` is the method of what is no search.
        FhirError where no answer comes in this share of the time that is left: 504, else 502."""
        if body is not None and not writes:
            headers = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        deadline = self.patience.deadline(share)
        try:
            for _ in range(5):
                request = self._request(url, body, dict(headers), self.host, method=writes or None)
                answer: Answer = self._opener.open(request, timeout=deadline - time.monotonic())
                if answer.status not in (301, 302, 303, 307, 308) or writes:
                    return answer
                if body is not None and answer.status < 307:  # a GET might follow, without what it asks for
                    raise refused(f"redirects a posted search with status {answer.status}, not 307 or 308")
                url = self.inside(answer.headers.get("location", ""), url) or ""
                if not url:
                    raise refused("redirects to an address that is not its own")
            raise refused("redirects in circles")
        except (BadRequest, OSError) as error:
            if isinstance(error, BadRequest) and error.status != 408:
                raise refused(f"sent an answer that can't be read: {error}")
            if time.monotonic() >= deadline:
                raise refused(f"did not answer in time (--fhir-timeout {self.patience.seconds:g})", 504)
            raise refused(f"can't be reached, or broke off ({type(error).__name__})")

    def _send(self, request: Any) -> Answer:
        """Answer urllib's request over an idle connection on which nothing came unasked, or over a new one.
        What only reads may be repeated, where an idle connection turns out to be closed; what writes goes
        over a new one at once. Each is in one thread's hands at a time: list.pop takes it out."""
        idle = [] if hasattr(request, "method") else self._idle  # it has one where `ask` was told
        deadline, body, url = time.monotonic() + request.timeout, request.data or b"", request.full_url
        head = f"{request.get_method()} {request.selector} HTTP/1.1\r\n{self.headers}"
        head += "".join([f"{name}: {value}\r\n" for name, value in request.headers.items()])
        head += f"Content-Length: {len(body)}\r\n\r\n" if body else "\r\n"
        message = head.encode("latin-1", "replace") + body
        while True:
            try:
                connection = idle.pop()
            except IndexError:
                address = (self.host, self.port)
                connection = Connection(self.https, self.host, [address], deadline, self.sockets, MAX_ANSWER)
            try:
                if not connection.used or connection.is_quiet():
                    return connection.exchange(message, url, deadline)
                connection.reusable = False
            except StaleConnection:
                self.close()  # the others are as old
            finally:
                if connection.reusable and len(self._idle) < 64 and not connection.timed.ended:
                    self._idle.append(connection)
                else:
                    connection.close()

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    def inside(self, url: str, seen_at: str) -> str | None:
        """An address that the FHIR server gave; None if not below its base. Whatever the host in it (the
        server may go by another name), requests only ever go to --fhir-server."""
        try:
            url = urljoin(seen_at, url)
            url.encode()  # fails for half a surrogate pair
            scheme, _, path, query, _ = urlsplit(url)
        except ValueError:
            return None
        for base in (self.base, *self.names):
            if url.startswith(base) and url[len(base):len(base) + 1] in ("", "/", "?"):
                path = self.path + re.split("[?#]", url[len(base):])[0]
        if (scheme not in ("http", "https") or not (path + "/").startswith(self.path + "/")
                or re.search(r"/\.|%2e|%2f|%5c|//|\\", path, re.IGNORECASE)):
            return None
        safe = "!$%&'()*+,/:;=?@[]~|"
        return self.origin + quote(path, safe=safe) + ("?" + quote(query, safe=safe) if query else "")

    def _spell(self, names: list[str]) -> None:
        """Prepare to find the server's bases, however spelled, and other traces of its names."""
        addresses, traces, hints = [], [], set[str]()
        for base in (self.base, *names):
            parts = urlsplit(base)
            host, port, before = parts.hostname or "", parts.port, r"(?:(?<![\w.-])|(?<=%2[Ff]))"
            path = "".join(_SLASH if char == "/" else re.escape(char) for char in parts.path)
            is_near, usual_port = is_this_machine(host), port in (None, 80, 443)
            name = _NEAR if is_near else f"(?i:{re.escape(f'[{host}]' if ':' in host else host)})"
            with_port = f"{_COLON}0*{'(?:80|443)' if usual_port else port}(?!\\d)"
            where = f"{name}(?:{with_port})?" if usual_port else name + with_port
            slashes = r"(?:(?<=//)|(?<=/\\/)|(?<=%2[Ff]%2[Ff]))"
            if is_near and usual_port:  # everybody's name, and a number: only in an address is it its own
                trace, more = rf"{slashes}{where}(?![\w.:-]|%3)", {"/", "%2f"}
            elif is_near:
                trace, more = before + where, {str(port)}
            elif re.search(r"[.:]", host[:-1]):  # the name alone tells too much
                trace, more = rf"{before}{name}(?:{_COLON}\d+)?(?![\w-])", {host}
            else:  # "fhir", "server": it may be a mere word
                trace = rf"{slashes}{name}(?:{_COLON}\d+)?(?![\w-]|\.\w)|{before}{name}{with_port}"
                more = {f"//{host}", rf"/\/{host}", f"%2f{host}", f"{host}:", f"{host}%3a"}
            addresses.append(f"https?{_COLON}{_SLASH}{_SLASH}{where}{path}(?![\\w.~:@-])")
            traces.append(trace)
            hints |= more
        # New ones, in one step: other threads are at their answers, each with those that it began with.
        self._spelled = ((self.base, *names), hints,
                         re.compile("|".join(addresses)), re.compile("|".join(traces)))
        self.names = names  # bases that the server says are its own

    def rewritten(self, body: bytes, ours: str) -> str:
        """The text of an answer, with `ours` for each address of the FHIR server; ValueError if not UTF-8.
        Other traces (another path on its host) become fhir-server.invalid. Base64 is not looked into."""
        text = body.decode("utf-8").removeprefix("\ufeff")  # some servers begin with this, a byte order mark
        bases, hints, addresses, traces = self._spelled
        if "\0" in text or "\1" in text:
            raise ValueError("a control character")
        if "\\" in text and _ESCAPED_ASCII.search(text):  # \u002f is a slash: an address could hide so
            text = json.dumps(json.loads(text))
        # By way of characters that can't be in JSON, for our own address may look like a trace of theirs; and
        # from the quick to the slow: mostly, after the first step nothing is left to look for.
        for base in bases:
            for end in '/?"' if base in text else "":
                text = text.replace(base + end, "\0" + end)
        if _hinted(text, hints):
            text = addresses.sub(functools.partial(_hide, "\0", "\1"), text)
            if _hinted(text, hints):
                text = traces.sub(functools.partial(_hide, NOWHERE[8:], NOWHERE[8:]), text)
            text = text.replace("\1", quote(ours, safe=""))
        return text.replace("\0", ours)

    def resource(self, answer: Answer, ours: str, *expected: str) -> tuple[Json, str]:
        """The resource in an answer, of the type and id expected, if any; its text, with our addresses."""
        check_status(answer)
        try:
            text = self.rewritten(answer.body, ours)
            value, end = _JSON.raw_decode(text, len(text) - len(text.lstrip(" \t\r\n")))
            if isinstance(value["resourceType"], str) and not text[end:].strip():
                if expected not in ((), (value["resourceType"], value.get("id"))):
                    raise refused("answered with another resource than the one asked for")
                return value, text
        except (ValueError, RecursionError, TypeError, KeyError):
            pass
        raise refused("answered with what is no FHIR JSON")

    def bundle(self, answer: Answer, ours: str, judge: Callable[[Any, str], T]) -> tuple[Json, list[T]]:
        """See split_bundle; with our addresses. Where its link to itself tells another name of the server
        (what stands before the path that was asked for), it is judged again, with that name known."""
        check_status(answer)
        known, path = self.names, urlsplit(answer.url).path[len(self.path):]
        try:
            own, judged = split_bundle(self.rewritten(answer.body, ours), judge)
        except (ValueError, RecursionError):
            raise refused("answered with what is no FHIR JSON")
        if own.get("resourceType") != "Bundle" or own.get("type") not in ("searchset", "collection"):
            raise refused("answered a search with what is no Bundle of results")
        for relation, url in links_of(own) if path else ():
            url = url.partition("?")[0]
            if relation == "self" and url.endswith(path):
                self._learn(url[:-len(path)], ours)
        return (own, judged) if self.names is known else self.bundle(answer, ours, judge)

    def resources(self, answer: Answer, ours: str) -> tuple[Json, list[Json]]:
        """The own members of the Bundle in an answer, and the resources in it."""
        own, entries = self.bundle(answer, ours, lambda entry, text: elements(entry, "resource"))
        return own, [resource for entry in entries for resource in entry if isinstance(resource, dict)]

    def _learn(self, name: str, ours: str) -> None:
        """Note a name that the server gives itself, in its metadata or a Bundle's link. No resource can teach
        one: whoever wrote it might name another server."""
        with contextlib.suppress(StartError):  # it is no address that a FHIR base can have
            name = fhir_base(name)
            with self._learning:
                if len(self.names) < 20 and name not in (ours, self.base, *self.names):
                    self._spell([*self.names, name])

    def statement(self, now: float, share: float = 1.0) -> Json:
        """The FHIR server's CapabilityStatement (DSTU2: Conformance), kept for five minutes."""
        statement, until = self._statement
        if now >= until:
            answer, statement = self.ask(f"{self.base}/metadata", share=share), {}
            if answer.status not in (200, 404):
                check_status(answer)
            with contextlib.suppress(FhirError):
                statement = self.resource(answer, "")[0]
            if statement.get("resourceType") not in ("CapabilityStatement", "Conformance"):
                raise refused("has no CapabilityStatement: is this the FHIR base?")
            self._statement = statement, now + 300
            for name in elements(statement, "implementation.url"):
                self._learn(str(name), "")
        return statement


# How this very machine may be spelled in an address: by name, as a number in any of C's ways, as IPv6.
_NEAR = (r"((?i:localhost\.?|[0-9][0-9a-fx.]{0,45}|\[[0-9a-f:.]{2,45}\]|"
         r"%5B(?:[0-9a-f.]|%3A|:){2,45}%5D))")


@remembered(1000)
def is_this_machine(host: str) -> bool:
    """Whether a host means this machine, as systems read it: 127.1, 0x7f000001 and [::ffff:7f00:1] do."""
    host, mapped = unquote(host).strip("[]").rstrip("."), bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2
    try:
        packed = socket.inet_pton(socket.AF_INET6, host) if ":" in host else mapped + socket.inet_aton(host)
    except (OSError, ValueError):
        return is_loopback(host)
    unspecified = bytes(16), mapped + bytes(4)  # :: and 0.0.0.0 reach it too
    return packed.startswith(mapped + b"\x7f") or packed in (bytes(15) + b"\1", *unspecified)


def _hinted(text: str, hints: set[str]) -> bool:
    """Whether something of the FHIR server's address may be in a text."""
    lower = text if all(map(str.isdecimal, hints)) else text.lower()
    for hint in hints:  # any() would take twice as long
        if hint in lower:
            return True
    return False


def _hide(plain: str, encoded: str, match: re.Match[str]) -> str:
    """What to put for an address of the FHIR server; it stays where its number is another machine's."""
    if match.lastindex and not is_this_machine(match[match.lastindex]):
        return match[0]
    return encoded if "%3" in match[0][:8] else plain


def links_of(own: Json) -> list[tuple[str, str]]:
    """A Bundle's links: (relation, address)."""
    return [(str(link.get("relation")), link["url"]) for link in elements(own, "link")
            if isinstance(link, dict) and isinstance(link.get("url"), str)]


_NO_ACCESS = "does not let this portal in ({}); --fhir-header can give it credentials"
_FAULTS = {400: (400, "does not accept this request ({})"), 422: (400, "does not accept this request ({})"),
           401: (502, _NO_ACCESS), 403: (502, _NO_ACCESS), 404: (404, "has no such resource"),
           409: (409, "sees a conflict ({})"), 410: (410, "deleted this resource"),
           412: (412, "has another version by now"), 429: (429, "is busy"), 503: (503, "is busy")}


def check_status(answer: Answer) -> None:
    """Only 200 goes on. 429 and 503 pass as they are: waiting helps, and S4S's imaging clients wait."""
    if answer.status != 200:
        status, description = _FAULTS.get(answer.status, (502, "answered with status {}"))
        wait, words = told(answer, "Retry-After") if status in (429, 503) else [], ""
        with contextlib.suppress(ValueError, RecursionError):
            outcome = json.loads(answer.body)
            words = "; ".join(map(str, elements(outcome, "issue.diagnostics", "issue.details.text")))
        raise refused(description.format(answer.status), status, wait, words)


# What may stand in a header: an entity tag, seconds, a date (RFC 9110). A server could put anything there.
_TOLD = re.compile('(?:W/)?"[A-Za-z0-9._~+=-]{1,64}"|[0-9]{1,9}|'
                   "[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def told(answer: Answer, *names: str) -> list[tuple[str, str]]:
    """Those of an answer's headers that come back."""
    headers = answer.headers
    return [(name, value) for name in names if _TOLD.fullmatch(value := headers.get(name.lower(), ""))]


def validators(answer: Answer, resource: Json) -> dict[str, str]:
    """ETag and Last-Modified; the former by the resource's own version where the FHIR server tells none."""
    found = dict(told(answer, "ETag", "Last-Modified"))
    for number in elements(resource, "meta.versionId"):
        if FHIR_ID.fullmatch(str(number)):
            found.setdefault("ETag", f'W/"{number}"')
    return found


# FHIR's versions that are understood: DSTU2, STU3, R4, R4B. Others say by other elements whose a resource is:
# in R5 an Appointment has a subject, a Device none.
VERSIONS_BEHIND = {"1.0": "dstu2", "3.0": "stu3", "4.0": "r4", "4.3": "r4"}
MISSED_SECONDS = 60    # for which a Binary that nothing points to is not looked for again
MAX_BINARIES = 10_000  # of which is remembered whether something does


class ForwardedRecords(Records):
    """The records of another FHIR server, --fhir-server. It is not trusted to filter: it may answer each
    search with everybody's records. So each answer is read whole, every resource in it judged, and only then
    sent on: as the text it came in, less what may not be seen, with this portal's addresses in it. It is
    trusted to label: a resource that says it is Daniel's is taken for Daniel's."""
    def __init__(self, portal: Portal):
        self.portal, self.upstream = portal, Upstream(portal.settings, portal.sockets)
        self.warnings: list[str] = []
        self.one_request = self.upstream.patience
        self._version = ("", 0.0)  # and until when it holds
        # (grant_id, its scope's hash, id) -> until when it counts as not found; inf where it was found
        self.binaries: dict[tuple[str, str, str], float] = {}

    @property
    def version(self) -> str:  # type: ignore[override]
        """Read from the server's metadata; where that fails, R4 is assumed. Nothing comes from a version that
        is not understood: nobody could tell whose it is."""
        now, base = self.portal.clock.now(), self.upstream.base
        if now >= self._version[1]:
            try:  # in half of the time, so that a read is possible after it
                text = str(self.upstream.statement(now, share=0.5).get("fhirVersion"))
                number = need(re.match(r"\d+\.\d+", text), "its metadata has no fhirVersion")[0]
                self._version = VERSIONS_BEHIND.get(number, number), now + 300
                if number not in VERSIONS_BEHIND:
                    self.portal.log(f"warning: {self._not_understood().description}")
            except PortalError as error:
                if not self.portal.stopping.is_set():  # else it was the stop that broke it off
                    self.portal.log(f"warning: --fhir-server {base}: R4 is assumed: {error.description}")
                self._version = "r4", now + 60
        if self._version[0] not in FHIR_VERSIONS:
            raise self._not_understood()
        return self._version[0]

    def _not_understood(self) -> FhirError:
        return refused(f"speaks FHIR {self._version[0]}; understood are {', '.join(VERSIONS_BEHIND)}")

    def check_type(self, asked: FhirRequest) -> None:
        """Types of which nobody can tell whose they are are refused, but to those who may see all."""
        if asked.type not in SERVED_TYPES:
            permit(any(asked.access.patients(asked.type, letter) is EVERYBODY for letter in "rs"),
                   f"{asked.type}: not served, since it can't be told whose record it is in")

    def answer(self, asked: FhirRequest) -> Response:
        """What the FHIR server answers, judged: the methods of Forwarding are named as the interactions."""
        try:
            return cast(Response, getattr(Forwarding(self, asked), asked.interaction)())
        except RecursionError:  # it came in, and is too deep to be read again further down the stack
            raise refused("answered with JSON that nests too deep")

    def describe(self, statement: Json, secured: bool) -> None:
        """Those of the FHIR server's types and parameters that the portal lets through."""
        theirs, resources = self.upstream.statement(self.portal.clock.now()), []
        for resource in elements(theirs, "rest.resource"):
            name = str(resource.get("type")) if isinstance(resource, dict) else ""
            offered = elements(resource, "interaction.code")
            codes = [code for code in interactions_with(name, secured) if code in offered]
            if codes and (not secured or name in SERVED_TYPES):
                parameters = [{"name": parameter["name"], "type": parameter["type"]}
                              for parameter in elements(resource, "searchParam")
                              if isinstance(parameter, dict) and may_be_forwarded(str(parameter.get("name")))
                              and re.fullmatch("[a-z]{3,9}", str(parameter.get("type")))]
                resources.append({"type": name, "interaction": [{"code": code} for code in codes],
                                  "searchParam": parameters})
        statement["rest"][0]["resource"] = resources
        if "everything" in elements(theirs, "rest.operation.name", "rest.resource.operation.name"):
            describe_everything(statement["rest"][0], self.version)
        version = re.match(r"\d+(\.\d+)*", str(theirs.get("fhirVersion")))
        statement.update(resourceType=theirs["resourceType"], fhirVersion=version and version[0])

    def find_patients(self, text: str = "") -> list[tuple[str, str]]:
        """The first 50 patients whose name has a part that begins so, asked in the portal's own name."""
        query = urlencode({**({"name": text} if text else {}), "_count": "50"}, quote_via=quote)
        return [(patient["id"], display_name(patient)) for patient in self._all("Patient", query)]

    def _all(self, type_name: str, query: str) -> list[Json]:
        """The resources of a type in the answer to a search, less those without a good id."""
        answer = self.upstream.ask(f"{self.upstream.base}/{type_name}?{query}")
        return [resource for resource in self.upstream.resources(answer, NOWHERE)[1]
                if resource.get("resourceType") == type_name and id_of(resource)]

    def patient_name(self, patient_id: str) -> str | None:
        """As the server has it, asked in the portal's own name; FhirError if it can't be asked."""
        if not FHIR_ID.fullmatch(patient_id):  # it might lead elsewhere
            return None
        answer = self.upstream.ask(f"{self.upstream.base}/Patient/{patient_id}")
        if answer.status in (404, 410):
            return None
        return display_name(self.upstream.resource(answer, "", "Patient", patient_id)[0])

    def lacks_patient(self, patient_id: str) -> bool:
        """Whether the server says so; one that is down will be noticed when the app reads."""
        try:
            return self.patient_name(patient_id) is None
        except FhirError:
            return False

    def birth_dates(self, patient_ids: list[str]) -> dict[str, str]:
        """Asked in one search; a server that can't tell keeps nobody from choosing."""
        query = urlencode({"_id": ",".join(patient_ids), "_count": str(len(patient_ids))})
        try:
            people = self._all("Patient", query)
        except FhirError:
            return {}
        return {person["id"]: str(person.get("birthDate", "")) for person in people}

    def visits(self, patient_id: str) -> list[Json]:
        """The first hundred that the server gives, less those that turn out to be another patient's."""
        query = f"patient={quote(patient_id, safe='')}&_count=100"
        return [visit for visit in self._all("Encounter", query) if owner(visit, NOWHERE) == patient_id]

    def load(self, document: Json) -> int:
        """Refused: nothing is kept here."""
        raise PortalError("invalid_request", "the records are the FHIR server's: load them there")

    def reset(self) -> None:
        """Forget what was found out."""
        self.binaries.clear()
        self._version = ("", 0.0)
        self.upstream.forget()

    def close(self) -> None:
        """Close the idle connections."""
        self.upstream.close()


# Search parameters that go to the FHIR server: those of the types, and of the common ones these. The others
# could look into other records and tell by what is found what stands there (_has, _filter, _query ...).
FORWARDED = ("_id", "_lastUpdated", "_tag", "_profile", "_security", "_source", "_language", "_sort",
             "_count", "_include", "_revinclude", "_total")
# These stay here: only whole resources can be judged, and a server may answer with more than asked.
NOT_FORWARDED = ("_elements", "_summary", "_format", "_pretty")
OWNER_PARAMETERS = ("patient", "subject", "beneficiary")  # their value is the owner, in whichever type
PINNED_BY = {"Patient": "_id", "Coverage": "beneficiary", "AdverseEvent": "subject"}  # all others: patient


def may_be_forwarded(name: str) -> bool:
    """Whether a search parameter may go on, by its name: FHIR's own are all in lower case, so that Patient=
    or SUBJECT=, which some servers read as well, can't slip past the check of what they hold."""
    return name in FORWARDED or bool(re.fullmatch(r"[a-z][a-z0-9-]*", name))


def owner_value(pin: str, patient_ids: Iterable[str]) -> str:
    """Patients as the value of the parameter that pins a search to them."""
    return ",".join(patient_id if pin == "_id" else f"Patient/{patient_id}" for patient_id in patient_ids)


def forwarded_parameter(allowed: frozenset[str], pin: str, name: str, value: str) -> tuple[str, str]:
    """One parameter of a search as it goes on. Asking for another patient is refused in words, not found
    empty: in a parameter that names the owner, under whichever name, and by Patient/... in any other. So is
    what can't be checked: chains (a.b), and modifiers on what names the owner, but for subject:Patient."""
    stem, _, modifier = name.partition(":")
    chained = "." in name or (stem == "_sort" and "." in value)
    permit(not chained and may_be_forwarded(stem), f"{name}: not forwarded, may look into other records")
    owns = stem in OWNER_PARAMETERS or stem == pin
    permit(not owns or modifier in ("", "Patient"), f"{name}: expected {stem} without a modifier")
    texts = value.split(",")
    if owns or modifier == "Patient":
        patient_ids = [text.removeprefix("Patient/") for text in texts]
    else:
        patient_ids = [patient_id for text in texts for patient_id in re.findall(r"Patient/([^/|&?]*)", text)]
    for patient_id in patient_ids:
        permit(FHIR_ID.fullmatch(patient_id) and patient_id in allowed,
               f"{name}={patient_id}: the token is not for this patient's record")
    if owns:
        return pin, owner_value(pin, patient_ids)
    return (stem, owner_value("", patient_ids)) if modifier == "Patient" else (name, value)


class Entry(NamedTuple):
    """An entry of a Bundle, judged."""
    mode: str  # match or include; "" for one that was dropped
    name: str  # Type/id
    text: str  # as it goes out


HIDDEN, UNPLACED = Entry("", "", ""), Entry("", UNKNOWN, "")  # of the second nobody can tell whose it is
BESIDE = Entry("", "include", "")  # hidden too, but no match: it makes no total wrong
_NAMED = re.compile(r'(?<=["/])([A-Z][A-Za-z]{1,63}/[A-Za-z0-9.-]{1,64})(?:/_history/[A-Za-z0-9.-]{1,64})?"')
_CANONICAL = re.compile(r'"questionnaire"\s*:\s*"([^"]+)"')  # by which answers name their form since R4


def going_with(matches: list[Entry], included: list[Entry]) -> list[Entry]:
    """Those of the included entries that a match refers to, or that refer to one."""
    def named(entry: Entry) -> set[str]:
        text = entry.text.replace("\\/", "/")
        return {*_NAMED.findall(text), *_CANONICAL.findall(text)}

    def names(entry: Entry) -> set[str]:
        if not entry.name.startswith("Questionnaire/"):
            return {entry.name}
        form = json.loads(entry.text)["resource"]
        return {entry.name, str(form.get("url")), f"{form.get('url')}|{form.get('version')}"}

    ours = set[str]().union(*map(names, matches))
    wanted = set[str]().union(*map(named, matches if included else ()))
    return [entry for entry in included
            if not wanted.isdisjoint(names(entry)) or not ours.isdisjoint(named(entry))]


def left_out(sent: Pairs, own: Json) -> Pairs:
    """Those of a search's parameters that the server's link to itself does not name, if it names any: they
    were not used (FHIR search, "Handling Errors")."""
    used = [pair for relation, url in links_of(own) if relation == "self"
            for pair in parse_qsl(url.partition("?")[2])]
    names = {name for name, _ in used} - {"_include", "_revinclude", "_sort"}
    return [pair for pair in sent if used and pair not in used and pair[0] not in names]


_PREFERENCES = re.compile(r"(?<![\w-])(?:handling|return)=[\w-]+")  # those of FHIR that travel


class FetchedResource(Resource):
    """A resource that the FHIR server sent."""
    def __init__(self, content: Json, forwarding: Forwarding):
        super().__init__(content, forwarding.base)
        self.forwarding = forwarding
        if self.type == "Provenance":  # of one about another nobody could keep track: see place_provenances
            self.owner = owner(content, self.base, forwarding.owners)
        elif id_of(content):
            forwarding.owners[f"{self.type}/{self.id}"] = self.owner

    def is_pointed_to(self, access: Access) -> bool:
        """The server is asked for the record's documents."""
        return self.forwarding.finds_binary(str(self.id))


class Forwarding:
    """One request to the FHIR server behind, and the judgement on its answer. `base` is this portal's FHIR
    base, under which every address in the answer will be."""
    def __init__(self, records: ForwardedRecords, asked: FhirRequest):
        self.records, self.upstream, self.portal = records, records.upstream, records.portal
        self.asked, self.request, self.access, self.base = asked, asked.request, asked.access, asked.base
        self.version = records.version  # or 502: in another nobody could tell whose a resource is
        if (asked.interaction, asked.type) != ("read", "Binary"):
            fhir_type(asked.request, self.version)  # or 406, before anybody is asked
        self.letters = LETTERS_OF[asked.interaction]
        # A page of ours, gathered from one or more of the FHIR server's.
        self.matches, self.included, self.dropped = [], [], []  # type: list[Entry], list[Entry], list[Entry]
        self.next_pages: dict[str, str] = {}  # relation -> address at the FHIR server
        self.whole = True                     # nothing is left to read
        self.own: Json = {}                   # the last Bundle's own members
        self.left_out: Pairs = []             # parameters that the server did not use
        self.owners: dict[str, str] = {}      # whose what came is, by Type/id: what a Provenance is about
        self.lookups = MAX_PAGES              # left, for more of these

    def headers(self, *names: str) -> dict[str, str]:
        """Those of the request's headers that travel on. Authorization and cookies never do; and no
        preference for an answer that would not come here to be judged (respond-async)."""
        given = self.request.headers
        travelling = {name: value for name in names if (value := given.get(name.lower()))}
        preferred = ", ".join(_PREFERENCES.findall(travelling.pop("Prefer", "")))
        return {**travelling, "Prefer": preferred} if preferred else travelling

    def version_of(self, answer: Answer) -> str:
        """The FHIR version of an answer: DSTU2's media type is its own."""
        is_dstu2 = answer.headers.get("content-type", "").lower().startswith(FHIR_TYPES["dstu2"])
        return "dstu2" if is_dstu2 else self.version

    def read(self) -> Response:
        """One resource: fetched, then judged."""
        url, answer, resource, text = self.fetched()
        asked = self.asked
        if not self.may_see(resource, text):
            self.request.note(f"its owner is {owner(resource, self.base)!r}: it may not be seen")
            raise not_in_record(asked)
        headers = [*validators(answer, resource).items()]
        unless = self.headers("If-None-Match", "If-Modified-Since")
        if unless and self.upstream.ask(url, unless).status == 304:
            text = ""
        return one_resource(asked, text, headers, self.version_of(answer))

    def fetched(self) -> tuple[str, Answer, Json, str]:
        """The resource asked for, not judged yet: its address, the answer, itself and its text."""
        asked = self.asked
        url = f"{self.upstream.base}/{asked.type}/{asked.id}"
        url += f"/_history/{asked.version}" if asked.version else ""
        # First without If-None-Match: a 304 tells that it is there, and in which version, whosever it is.
        answer = self.upstream.ask(url, self.headers("Prefer"))
        if answer.status in (404, 410):  # judged all the same, which for a Binary means a search: same cost
            self.access.may_see(FetchedResource({"resourceType": asked.type, "id": asked.id}, self), "r")
            raise not_in_record(asked)
        resource, text = self.upstream.resource(answer, self.base, asked.type, asked.id)
        if asked.type == "Provenance" and not self.access.unlimited:
            self.find_targets([resource])
        return url, answer, resource, text

    def create(self) -> Response:
        """Create, or update. Judged is what the server would show of what it is sent: with its addresses, by
        which it knows what is its own, in place of this portal's. The version that was judged goes with it,
        so that nobody puts another patient's resource there in between."""
        asked, stored, tag, url = self.asked, None, "", f"{self.upstream.base}/{self.asked.type}"
        resource, body = sent_resource(asked, self.version), self.request.body
        if not asked.id and resource.pop("id", None) is not None:
            body = json.dumps(resource).encode()
        headers = {"Content-Type": FHIR_TYPES.get(self.version, FHIR_TYPE),
                   "Prefer": "return=representation"}
        ours = re.escape(self.base).replace("/", r"\\?/") + r'(?=\\?/|[?"])'  # PHP writes \/ in JSON
        sent = re.sub(ours, lambda _: self.upstream.base, body.decode())
        seen = self.upstream.rewritten(sent.encode(), self.base)
        resource = parse_json(seen.encode())
        check_pointers(self.records, asked, resource, abroad=True)  # before another's could be told by it
        if asked.id:
            url, answer, found, text = self.fetched()
            stored, tag = self.placed(found, text), validators(answer, found).get("ETag", "")
            headers.update({"If-Match": tag} if tag else {})
        new = self.placed(resource, seen)
        judge_write(self.records, asked, new, stored, tag)
        answer = self.upstream.ask(url, headers, sent.encode(), writes="PUT" if asked.id else "POST")
        return self.written(answer, new.owner)

    update = create

    def placed(self, resource: Json, text: str) -> FetchedResource:
        """A resource of a write, to be judged. See `may_see`: of one that holds others nobody can tell."""
        if resource.get("resourceType") == "Provenance":
            self.find_targets([resource])
        placed = FetchedResource(resource, self)
        if holds_another(resource, text):
            placed.owner = UNKNOWN
        return placed

    def written(self, answer: Answer, patient_id: str) -> Response:
        """The answer to a write. The server says where it is, and what it made of it, which is judged too:
        something else is not shown, though it is there now."""
        asked, resource, text = self.asked, cast(Json, {}), ""
        if answer.status in (404, 410) and asked.id:  # deleted in between
            raise not_in_record(asked)
        answer = answer._replace(status=200) if answer.status in (201, 204) else answer
        check_status(answer)
        if answer.body.strip():
            resource, text = self.upstream.resource(answer, self.base)
            placed = self.placed(resource, text)
            is_what_was_sent = (
                (placed.type, id_of(resource)) == (asked.type, asked.id or placed.id)
                and placed.owner == patient_id
                and self.access.may_write(placed, LETTERS_OF[asked.interaction]))
            if placed.type == "OperationOutcome":  # in the server's words
                resource, text = {}, ""
            elif not is_what_was_sent:
                raise refused("stored something else than what was sent: it is not shown")
        where = re.fullmatch(rf"(?:.*/)?{asked.type}/({_ID})(/_history/{_ID})?",
                             answer.headers.get("location", ""))
        key, version = where.groups("") if where else (id_of(resource), "")
        if not (asked.id or key):
            raise refused("does not say where it stored what was sent")
        headers = [("Location", f"{self.base}/{asked.type}/{asked.id or key}{version}"),
                   *validators(answer, resource).items()]
        status = 200 if asked.id else 201
        return fhir_response(asked.request, text, status, headers, self.version_of(answer))

    def may_see(self, resource: Json, text: str) -> bool:
        """Whether a resource may be seen, and its text holds no other."""
        return self.access.unlimited or (not holds_another(resource, text) and self.access.may_see(
            FetchedResource(resource, self), self.letters))

    def find_targets(self, provenances: Iterable[Json]) -> None:
        """Ask whose that is which Provenances are about, a type at a time, if it did not come with them."""
        texts = [str(text) for provenance in provenances for text in elements(provenance, "target.reference")]
        names = sorted({local_name(text, self.base) for text in texts} - self.owners.keys())
        for type_name, group in itertools.groupby(names, lambda name: name.partition("/")[0]):
            if type_name in SHARED_TYPES:
                self.owners.update(dict.fromkeys(group, NOBODY))
            elif type_name in OWNER_ELEMENTS and type_name != "Patient":
                ids = [name.partition("/")[2] for name in group]
                for start in range(0, len(ids), 100):  # all at once might be too long for an address line
                    search = f"{type_name}?_id={','.join(ids[start:start + 100])}&_count=100"
                    for _ in self.all_of(search):  # each notes whose it is
                        pass

    def all_of(self, search: str) -> Iterator[FetchedResource]:
        """What the FHIR server finds, as far as the lookups left go."""
        url = f"{self.upstream.base}/{search}"
        while url and self.lookups:
            self.lookups -= 1
            answer = self.upstream.ask(url)
            if answer.status in (400, 403, 404, 410, 422):  # it has no such type, or doesn't show it
                break
            own, resources = self.upstream.resources(answer, self.base)
            yield from (FetchedResource(resource, self) for resource in resources)
            url = self.links(own, answer).get("next", "")

    def finds_binary(self, binary_id: str) -> bool:
        """Whether a document or report of the record points to a Binary. What was found is remembered, and
        for a minute what was not: each look may take MAX_PAGES questions."""
        known, now = self.records.binaries, self.portal.clock.now()
        record = self.asked.grant_id, hash_secret(self.access.scope)
        until = known.get((*record, binary_id), 0.0)
        if until <= now:
            found = dict.fromkeys(self.access.binaries_in(self.documents()), math.inf)
            until = found.setdefault(binary_id, now + MISSED_SECONDS)
            if len(known) > MAX_BINARIES:
                known.clear()
            known.update(((*record, name), end) for name, end in found.items())
        return until == math.inf

    def documents(self) -> Iterator[Resource]:
        """The record's documents and reports."""
        patients = self.access.patients("Binary", "r")
        pins = [""] if isinstance(patients, Everybody) else [
            f"patient=Patient/{quote(patient_id)}&" for patient_id in sorted(patients)]
        for pin, type_name in itertools.product(pins, DOCUMENT_TYPES):
            yield from self.all_of(f"{type_name}?{pin}_count=100")

    def search(self) -> Response:
        """A page of a search, from its beginning or by a paging link."""
        if page := self.page_url():
            return self.page(page, [])
        return self.page(f"{self.upstream.base}/{self.asked.type}", self.pinned())

    def pinned(self) -> Pairs:
        """The search to send: each parameter checked, and pinned to the patients that may be seen."""
        asked, pairs, openly = self.asked, self.request.pairs(), self.access.unlimited
        pin = PINNED_BY.get(asked.type, "patient")
        if asked.compartment:  # Patient/P/Observation is Observation?patient=P, which more servers understand
            pairs = [(pin, asked.compartment), *pairs]
        counts = ("_summary", "count") if openly else None
        # A reference by this portal's address goes on without it: that server knows it by another.
        pairs = [(name, ",".join(map(self.known_behind, value.split(","))))
                 for name, value in pairs
                 if value and (name.partition(":")[0] not in NOT_FORWARDED or (name, value) == counts)]
        if openly:
            return pairs
        allowed = self.access.patients(asked.type, "s")
        sent = [forwarded_parameter(allowed, pin, name, value) for name, value in pairs]
        if not isinstance(allowed, Everybody) and asked.type not in SHARED_TYPES and pin not in dict(sent):
            sent.append((pin, owner_value(pin, sorted(allowed))))
        return sent

    def known_behind(self, text: str) -> str:
        """A value below this portal's base as the FHIR server knows it; any other as it is."""
        if not text.startswith(self.base + "/"):
            return text
        return local_name(text, self.base) or self.upstream.base + text[len(self.base):]

    def everything(self) -> Response:
        """Patient/[id]/$everything. It reads and searches, so each resource in it takes both letters."""
        pairs = self.request.pairs()
        everything_asked(pairs)
        url = self.page_url() or f"{self.upstream.base}/Patient/{self.asked.id}/$everything"
        return self.page(url, [pair for pair in pairs if pair[0] in EVERYTHING_PARAMETERS])

    def page_url(self) -> str:
        """The FHIR server's address behind a paging link, 403 for another authorization's; "" if the request
        is none."""
        pairs = [pair for pair in self.request.pairs() if pair[0] not in NOT_FORWARDED]
        if "_page" not in dict(pairs):
            return ""
        need(len(pairs) == 1, "_page: a paging link takes no other parameters", "invalid", kind=FhirError)
        row = need(self.portal.state.row("SELECT * FROM pages WHERE handle = ? AND expires > ?", pairs[0][1],
                                         self.portal.clock.now()),
                   "this paging link has expired, or never was: search again", "not-found", 404, FhirError)
        permit((row["grant_id"], row["path"]) == (self.asked.grant_id, self.request.rest),
               "this paging link belongs to another authorization or search")
        return str(row["url"])

    def own_links(self) -> list[Json]:
        """Our Bundle's links: to itself, and to the pages to come, by a handle for each, good for this
        authorization and path. It tells nothing of the address behind it: that may hold the FHIR server's
        name, or what it needs no token for."""
        now, grant_id, path = self.portal.clock.now(), self.asked.grant_id, self.asked.path
        used = [pair for pair in self.request.pairs() if pair not in self.left_out]
        query = urlencode(used, quote_via=quote, safe=",:/|")
        links = {"self": f"{self.base}/{path}?{query}".rstrip("?")}
        handles = [(secrets.token_urlsafe(16), grant_id, path, url, now + PAGE_SECONDS)
                   for url in self.next_pages.values()]
        if handles:
            with self.portal.state.transaction() as database:
                forget_expired(database, "pages", now)
                database.executemany("INSERT INTO pages VALUES (?, ?, ?, ?, ?)", handles)
                database.execute(
                    "DELETE FROM pages WHERE grant_id = ? AND rowid <= (SELECT rowid FROM pages WHERE "
                    "grant_id = ? ORDER BY rowid DESC LIMIT 1 OFFSET ?)", (grant_id, grant_id, MAX_LINKS))
        for relation, (handle, *_) in zip(self.next_pages, handles):
            links[relation] = f"{self.base}/{path}?_page={handle}"
        return [{"relation": relation, "url": url} for relation, url in links.items()]

    def links(self, own: Json, answer: Answer) -> dict[str, str]:
        """The pages that a Bundle links to: relation -> address at the FHIR server. One to the next page that
        leads elsewhere is an error: without it, the app would take the page for the last."""
        links: dict[str, str] = {}
        for relation, url in links_of(own):
            url = url.replace(self.base, self.upstream.base)  # it was rewritten with all the rest
            url = url.replace(quote(self.base, safe=""), quote(self.upstream.base, safe=""))
            inside = self.upstream.inside(url, answer.url)
            if inside and relation in ("first", "previous", "prev", "next", "last"):
                links[relation] = inside
            elif relation == "next":
                raise refused("gave a link to the next page that does not lead to itself")
        return links

    def judged(self, answer: Answer) -> tuple[Json, list[Entry]]:
        """A Bundle's own members, and its entries, judged. Last come Provenances: what they are about may
        stand after them."""
        reachable = self.access.allows("Provenance", self.letters[0])

        def judge(entry: Any, text: str) -> Entry:
            verdict = self.judge(entry, text)
            if verdict.mode or not reachable or elements(entry, "resource.resourceType") != ["Provenance"]:
                return verdict
            return Entry("late", "", text)

        own, entries = self.upstream.bundle(answer, self.base, judge)
        late = [(json.loads(entry.text), entry.text) for entry in entries if entry.mode == "late"]
        self.find_targets(entry["resource"] for entry, _ in late)
        return own, [*(entry for entry in entries if entry.mode != "late"),
                     *(self.judge(entry, text) for entry, text in late)]

    def judge(self, entry: Any, text: str) -> Entry:
        """An entry, judged. What stands in it beside its resource is not, so it must be the words that we
        would use, or it is written anew. Dropped silently are other patients' records, included ones too;
        OperationOutcomes, which may quote anything; Bundles within the Bundle."""
        resource = entry.get("resource") if isinstance(entry, dict) else None
        if not isinstance(resource, dict):
            return HIDDEN
        search = entry.get("search")
        mode = "include" if isinstance(search, dict) and search.get("mode") == "include" else "match"
        if not self.may_see(resource, text):
            if mode == "include":
                return BESIDE
            has_owner = str(resource.get("resourceType")) in OWNER_ELEMENTS
            return UNPLACED if has_owner and owner(resource, self.base) == UNKNOWN else HIDDEN
        name = f"{resource.get('resourceType')}/{resource.get('id')}"
        words = {"fullUrl": f"{self.base}/{name}", "search": {"mode": mode}, "resource": resource}
        if not id_of(resource):
            del words["fullUrl"]
        if not entry.items() <= words.items():
            text = json.dumps({member: words[member] for member in entry if member in words})
        return Entry(mode, name, text)

    # Theory of a page. Where categories hide something, an empty place, a link to a page of nothing, or what
    # was included with it would tell that it is there. So a page of ours is filled from the server's next,
    # and a link to the next comes if there is one more to see, or after MAX_PAGES. The address behind it ends
    # in #, how many were seen of the server's page already, and the size of ours. The server's `total` can't
    # be checked: it comes only where all that it counts is on this page. _summary=count and _total=accurate
    # are counted here.

    def page(self, url: str, sent: Pairs) -> Response:
        """A Bundle of what may be seen of the FHIR server's answer to `sent`."""
        narrowed, (url, _, mark) = self.access.narrowed, url.partition("#")
        asked = dict(self.request.pairs())
        count = asked.get("_count", "20")
        if not re.fullmatch("[0-9]{1,9}", count):
            raise FhirError("value", f"_count={count}: expected a whole number")
        skip, size = map(int, mark.split(",")) if mark else (0, int(count))
        counting = not self.access.unlimited and (size == 0 or asked.get("_summary") == "count")
        many = [pair for pair in sent if pair[0] != "_count"]
        many += [("_count", str(max(size, 100)))] if sent else []
        reads_on, fills = narrowed or counting, narrowed and not counting
        answer = self.gather(url, many if reads_on else sent, skip, size, fills, reads_on)
        total = self.total(counting)
        if ("_total", "accurate") in sent and total is None and not reads_on and not self.access.unlimited:
            counter = Forwarding(self.records, self.asked)
            counter.gather(url, many, 0, 0, fills=False, reads_on=True)
            total = counter.total(counting=True)
        text = json.dumps({"resourceType": "Bundle", "type": self.own["type"],
                           **({} if total is None else {"total": total}), "link": self.own_links()})
        if narrowed:
            self.included = going_with(self.matches, self.included)
        shown = [] if counting else [entry.text for entry in (*self.matches, *dict.fromkeys(self.included))]
        if shown:
            text = f"{text[:-1]}, \"entry\": [{', '.join(shown)}]}}"
        if set(self.dropped) == {UNPLACED} and not self.matches and not self.included:
            self.portal.log(f"warning: {self.asked.path}: nobody can tell whose the {len(self.dropped)} "
                            "resources are that came; if they name patients by another address of the FHIR "
                            "server, its metadata should tell it (implementation.url)")
        return fhir_response(self.request, text, version=self.version_of(answer))

    def gather(self, url: str, sent: Pairs, skip: int, size: int, fills: bool, reads_on: bool) -> Answer:
        """Read pages of the FHIR server, from the `skip`th match of the first: until ours is full (`fills`),
        or to the end (`reads_on` alone), or just one. Gives the last answer."""
        query = urlencode(sent, quote_via=quote, safe="/:,|")
        # A search that was posted is posted on: what a patient has may be too private for the address line.
        form = query.encode() if query and self.request.path.endswith("/_search") else None
        ask, url = (f"{url}/_search" if form else ""), f"{url}?{query}" if query else url
        preferences = self.headers("Prefer")
        for number in range(MAX_PAGES):
            answer = self.upstream.ask(ask or url, preferences, form)
            self.own, entries = self.judged(answer)
            if number == 0 and "handling=lenient" in preferences.get("Prefer", ""):
                self.left_out = left_out(sent, self.own)
            matches = [entry for entry in entries if entry.mode == "match"]
            links, end = self.links(self.own, answer), skip + size - len(self.matches)
            self.matches += matches[skip:end] if fills else matches[skip:]
            self.included += [entry for entry in entries if entry.mode == "include"]
            self.dropped += [entry for entry in entries if not entry.mode]
            self.request.note(f"{len(entries)} entries came, {len(self.dropped)} may not be seen")
            if fills and len(matches) > end:
                self.next_pages = {"next": f"{url}#{end},{size}"}
                return answer
            if not reads_on or "next" not in links:
                self.next_pages = {} if reads_on else links
                return answer
            ask, form, url, skip = "", None, links["next"], 0
        self.whole = False
        self.next_pages = {"next": f"{url}#0,{size}"} if fills else {}
        return answer

    def total(self, counting: bool) -> int | None:
        """How many matches there are, if that was seen, and may be told; openly, what the server says."""
        total = self.own.get("total")
        if self.access.unlimited:
            return total if type(total) is int else None
        is_all = (self.whole and set(self.dropped) <= {BESIDE} and "next" not in self.next_pages
                  and not self.access.narrowed)
        return len(self.matches) if is_all and (counting or total == len(self.matches)) else None


# ######################################################################## 20 sample data

# Three people who never were. FACTS are tables of what is known of them. RECORDS says where FHIR R4 has it;
# STU3 and DSTU2, where these have what the version after them has elsewhere. `moved` reads all three.


def sample_resources(version: str) -> list[Json]:
    """The sample records in a version of FHIR, last changed at times spread over 2016 to 2018."""
    resources: list[Json] = []
    for type_name, source, moves in table(RECORDS):
        for row in DERIVED[source]() if source in DERIVED else rows(source):
            changed = datetime.date(2016, 1, 1) + datetime.timedelta(days=len(resources) * 3 % 1000)
            resources.append({"resourceType": type_name, "id": f"smart-{type_name}-{row['id']}",
                              "meta": {"versionId": "1", "lastUpdated": f"{changed}T12:00:00Z"},
                              **moved(row, moves)})
    for earlier in STEPS_FROM_R4[version]:
        resources = adapt(resources, earlier)
    return resources


def table(text: str) -> list[list[str]]:
    """The rows and columns of one of the tables below; an indented line goes on with the one before."""
    return [[cell.strip() for cell in line.split("|")] for line in text.replace("\n    ", " ").splitlines()]


@functools.cache
def rows(name: str) -> list[Json]:
    """The rows of a table of FACTS: cells by the names in its first row, without the empty ones."""
    names, *lines = table(FACTS[name])
    return [{**NAMED, **{name: cell for name, cell in zip(names, cells) if cell}} for cells in lines]


# Some of what SMART's sample patients have, with units in UCUM, and two codes put right that are none of
# SNOMED CT's now. Made up, since SMART has none: ethnicity, Amy's race, Daniel's phone, Daniel's and
# Joseph's vaccines, dates of smoking status, doses taken in the clinic, later fills, the health concern,
# Amy's visits, laboratory results but visit 1's, and all from PROCEDURES on (Daniel's). What TESTS names was
# measured at the visits that have a column there, or a value in its column of VISITS.
FACTS = {
    "-": "id\n1",  # for what there is once
    "PATIENTS": """id | given | initial | family | name | gender | sex | born | street | city | zip
    | phone | email | race
1032702 | Amy | V | Shaw | Amy Shaw | female | F | 2007-03-20 | 49 Meadow St | Mounds | 74047
    | 800-782-6765 | amy.shaw@example.com | 2054-5 Black or African American
1081332 | Joseph | I | Ross | Joseph Ross | male | M | 2003-10-02 | 19 Church St, Apt 29 | Tulsa | 74108
    | 800-960-9294 | joseph.ross@example.com | 2106-3 White
1288992 | Daniel | X | Adams | Daniel Adams | male | M | 1925-12-23 | 1 Hill Ave, Apt 14 | Tulsa | 74117
    | 800-782-6700 | daniel.adams@example.com | 2054-5 Black or African American""",
    "PROBLEMS": """id | who | since | problem | concern
14 | Daniel | 2005-05-22 | 48167000 Amnesia
15 | Daniel | 2007-07-11 | 1201005 Benign essential hypertension
16 | Daniel | 2007-07-11 | 396275006 Osteoarthritis
18 | Daniel | 2007-11-17 | 429998004 Vascular dementia, uncomplicated
19 | Daniel | 2008-04-20 | 38341003 Essential hypertension
20 | Daniel | 2008-07-10 | 427359005 Disorder of lung
21 | Daniel | 2008-08-08 | 26929004 Alzheimer's disease
22 | Daniel | 2008-08-08 | 191519005 Dementia associated with another disease
23 | Daniel | 2008-08-08 | 185903001 Needs influenza immunization
30 | Daniel | 2009-04-08 | 415510005 Sedentary lifestyle | health-concern
120 | Amy | 2007-12-19 | 267024001 Abnormal weight loss
122 | Amy | 2008-04-03 | 235595009 Gastroesophageal reflux disease
450 | Joseph | 2004-07-13 | 65363002 Otitis media
453 | Joseph | 2004-12-07 | 62315008 Diarrhea
456 | Joseph | 2004-12-07 | 233604007 Pneumonia
601 | Daniel | 2009-07-18 | 238012003 Thiopurine methyltransferase deficiency""",
    "ALLERGIES": """id | who | since | allergen | class | type | of | risk | reaction | severity
19 | Amy | 2000 | 716186003 No known allergies
20 | Joseph | 2000 | 716186003 No known allergies
28 | Daniel | 2000 | 387406002 sulfonamide antibacterial | N0000175503 sulfonamide antibacterial
    | allergy | medication | low | 271807003 skin rash | mild""",
    "MEDICATIONS": """id | who | written | medicine | directions | dose | times | days | fills
101 | Amy | 2008-04-05 | 582620 Nizatidine 15 MG/ML Oral Solution [Axid] | 10 mL bid | 10 mL | 2 | 30 | 187
102 | Joseph | 2004-07-13 | 308189 Amoxicillin 80 MG/ML Oral Suspension | 7 mL bid | 7 mL | 2 | 10 | 1229
140 | Daniel | 2008-08-13 | 404673 Memantine 10 MG Oral Tablet [Namenda] | 1 bid | 1 {tablet} | 2 | 90 | 19 20
141 | Daniel | 2008-08-14 | 153357 donepezil 10 MG Oral Tablet [Aricept] | 1 qhs | 1 {tablet} | 1 | 90 | 23
142 | Daniel | 2008-08-14 | 197770 Hydrochlorothiazide 50 MG Oral Tablet | 1 daily | 1 {tablet} | 1 | 90 | 9
139 | Daniel | 2008-08-13 | 314077 Lisinopril 20 MG Oral Tablet | 1 daily | 1 {tablet} | 1 | 90 | 14 15 16""",
    "IMMUNIZATIONS": """id | who | date | status | vaccine | refused
1 | Amy | 2007-09-27 | completed | 110 DTaP-hepatitis B and poliovirus vaccine
5 | Daniel | 2008-10-14 | completed | 141 Influenza, seasonal, injectable
9 | Joseph | 2005-04-04 | completed | 21 varicella virus vaccine
10 | Daniel | 2009-10-29 | not-done | 141 Influenza, seasonal, injectable | PATOBJ Patient objection""",
    "SMOKING": """id | who | date | smokes
21 | Daniel | 2009-12-01 | 8517006 Ex-smoker
5 | Amy | 2008-06-29 | 428041000124106 Occasional tobacco smoker
6 | Joseph | 2007-06-20 | 8517006 Ex-smoker""",
    "VISITS": """id | who | date | 8867-4 | 9279-1 | 8310-5 | 29463-7 | 8302-2 | 39156-5 | 59408-5 | 85354-9
829 | Daniel | 1997-05-01 | 67 | 20 | 37.0 | 99.6 | 164.8 | 36.6 | 100 | 107/67
834 | Daniel | 2001-01-24 | 63 | 20 | 37.1 | 91.7 | 165.6 | 33.4 | 100 | 100/63
836 | Daniel | 2001-10-31 | 82 | 20 | 37.0 | 93.3 | 165.9 | 33.9 | 100 | 133/82
841 | Daniel | 2005-02-10 | 58 | 22 | 36.9 | 93.5 | 166.9 | 33.6 | 100 | 97/58
842 | Daniel | 2005-02-23 | 35 | 22 | 36.9 | 93.9 | 166.6 | 33.8 | 100 | 60/35
1 | Daniel | 2008-07-10
846 | Daniel | 2009-04-08 | 72 | 20 | 36.9 | 89.3 | 163.3 | 33.5 | 100 | 120/72
847 | Daniel | 2009-04-14 | 75 | 20 | 36.9 | 92.4 | 163.3 | 34.7 | 100 | 125/75
851 | Daniel | 2009-04-28 | 79 | 20 | 36.9 | 90.7 | 163.1 | 34.1 | 100 | 132/79
852 | Daniel | 2009-10-29 | 72 | 20 | 36.9 | 88.0 | 163.1 | 33.1 | 100 | 120/72
854 | Daniel | 2009-12-01 | 60 | 20 | 36.9 | 91.5 | 163.1 | 34.4 | 100 | 100/60
2 | Amy | 2008-03-24 | | | | 9.0 | 74.2 | 16.3 | | 86/40
3 | Amy | 2009-03-26 | | | | 11.9 | 86.3 | 16.0 | | 88/45
4 | Amy | 2010-04-01 | | | | 14.0 | 94.6 | 15.6 | | 89/49
5 | Amy | 2011-03-28 | | | | 15.9 | 101.3 | 15.5 | | 91/52
6 | Amy | 2012-04-02 | | | | 18.0 | 108.0 | 15.4 | | 93/54
7 | Amy | 2013-03-25 | | | | 20.3 | 115.0 | 15.3 | | 94/56
8 | Amy | 2014-09-29 | | | | 24.3 | 124.8 | 15.6 | | 96/58
9 | Amy | 2016-03-21 | | | | 28.9 | 132.9 | 16.4 | | 98/59""",
    "TESTS": """LOINC | name | low | high | unit | called | 1 | 836 | 842 | 851 | 852 | 854
8867-4 | Heart rate | | | /min
9279-1 | Respiratory rate | | | /min
8310-5 | Body temperature | | | Cel
29463-7 3141-9 | Body weight | | | kg
8302-2 | Body height | | | cm
39156-5 | Body mass index (BMI) | | | kg/m2
59408-5 2708-6 | Oxygen saturation in Arterial blood by Pulse oximetry | | | %
85354-9 55284-4 | Blood pressure | | | mm[Hg]
1975-2 | Bilirub SerPl-mCnc | 0 | 1 | mg/dL | Bilirubin | 1.8
2345-7 | Glucose SerPl-mCnc | 70 | 109 | mg/dL | Glucose | 99 | 88 | 94 | 104 | 112 | 107
5821-4 | WBC #/area UrnS HPF | 0 | 5 | /[HPF] | White cells in urine | 1
2085-9 | HDLc SerPl-mCnc | | | mg/dL | HDL cholesterol | 59
5802-4 | Nitrite Ur Ql Strip | | | | Nitrite in urine | Negative
13457-7 2089-1 | LDLc SerPl Calc-mCnc | 0 | 100 | mg/dL | LDL cholesterol | 89 | 131 | 118 | 86 | 92 | 90
5796-8 | Hyaline Casts #/area UrnS LPF | 0 | 2 | /[LPF] | Hyaline casts in urine | 9
11580-8 | TSH SerPl DL<=0.005 mU/L-aCnc | 0.4 | 4.2 | u[IU]/mL | TSH (thyroid)
    | 2.229 | 1.71 | 1.96 | 2.41 | 2.3 | 2.52
5767-9 | Appearance Ur | | | | Appearance of urine | Clear
5811-5 | Sp Gr Ur Strip | 1.003 | 1.03 | 1 | Density of urine | 1.022
5803-2 | pH Ur Strip | 5 | 8 | [pH] | pH of urine | 6
2951-2 | Sodium SerPl-sCnc | 135 | 145 | mmol/L | Sodium | 139
2160-0 | Creat SerPl-mCnc | 0.8 | 1.4 | mg/dL | Creatinine | 1.4 | 1.0 | 1.2 | 1.5 | 1.6 | 1.5
1742-6 | ALT SerPl-cCnc | 0 | 45 | U/L | ALT (liver) | 13
2823-3 | Potassium SerPl-sCnc | 3.5 | 5.5 | mmol/L | Potassium | 3.4 | 4.4 | 4.1 | 3.7 | 3.9 | 4.0
718-7 | Hgb Bld-mCnc | 14 | 18 | g/dL | Hemoglobin | 12.8 | 14.6 | 13.9 | 12.6 | 12.9 | 13.1
2571-8 | Trigl SerPl-mCnc | 0 | 150 | mg/dL | Triglycerides | 62
2093-3 | Cholest SerPl-mCnc | 0 | 200 | mg/dL | Cholesterol | 160
26464-8 | WBC # Bld | 4.5 | 11.5 | 10*3/uL | White blood cells | 3.9
789-8 | RBC # Bld Auto | 4.6 | 6 | 10*6/uL | Red blood cells | 5.32
30522-7 | CRP SerPl HS-mCnc | 0 | 3 | mg/L | C-reactive protein | 4.4
4548-4 | Hgb A1c MFr Bld | 4 | 5.6 | % | Hemoglobin A1c | | | | 5.8 | | 6.1""",
    "PROCEDURES": """id | visit | procedure
1 | 834 | 73761001 Colonoscopy
2 | 841 | 399208008 Plain X-ray of chest
3 | 846 | 816077007 Magnetic resonance imaging of brain""",
    "IMAGES": """id | visit | modality | description | uid
1 | 841 | CR | Chest, two views | 2.25.164279582463318447291538442131974560
2 | 846 | MR | Brain without contrast | 2.25.298637104275598143330712644910385521""",
    "DOCUMENTS": """id | visit | type | format | text
1 | 851 | 34133-9 Summary of episode note | application/pdf | Seen for hypertension. No new complaints.
2 | 854 | 11506-3 Progress note | text/plain
    | Blood pressure 100/60, weight 91.5 kg. Continue present medicines.""",
    "BILLS": """id | visit | created | billed | paid
1 | 847 | 2009-04-20 | 145.00 | 116.00
2 | 851 | 2009-05-04 | 145.00 | 116.00"""}
US, HL7 = "http://hl7.org/fhir/us/core/", "http://terminology.hl7.org/CodeSystem/"
US_CORE = US + "StructureDefinition/us-core-"
IHE, CDC_RACE = "http://ihe.net/fhir/ValueSet/IHE.FormatCode.codesystem", "urn:oid:2.16.840.1.113883.6.238"
DICOM, ARGONAUT = "http://dicom.nema.org/resources/ontology/DCM", "http://argonaut.hl7.org"
SYSTEMS = {  # by the words that `moved` takes; any other word means one of HL7's own
    "LOINC": "http://loinc.org", "SNOMED": "http://snomed.info/sct", "CVX": "http://hl7.org/fhir/sid/cvx",
    "RXNORM": "http://www.nlm.nih.gov/research/umls/rxnorm", "NDFRT": "http://hl7.org/fhir/ndfrt", "IHE": IHE,
    "NUCC": "http://nucc.org/provider-taxonomy", "BCP47": "urn:ietf:bcp:47", "CDC": CDC_RACE, "DICOM": DICOM,
    "ARGONAUT": ARGONAUT, "SECTIONS": "http://hl7.org/fhir/ValueSet/diagnostic-service-sections"}
NAMED = {"DANIEL": {"reference": "Patient/smart-1288992"},
         "DOCTOR": {"reference": "Practitioner/smart-clinician", "display": "Clara Clinician"},
         "CLINIC": {"reference": "Organization/smart-clinic", "display": "SMART Example Clinic"},
         "INSURER": {"reference": "Organization/smart-insurer", "display": "Example Health Plan"}}


# What is more than the rows of a table.
def measurements() -> Iterator[Json]:
    """A row for each value measured at a visit."""
    for visit, test in itertools.product(rows("VISITS"), rows("TESTS")):
        loinc, _, second = test["LOINC"].partition(" ")
        value, unit = test.get(visit["id"], visit.get(loinc)), test.get("unit")
        if not value:
            continue
        row = {**visit, "visit": visit["id"], "id": f"{visit['id']}-{loinc}", "second": second or None,
               "code": f"{loinc} {test['name']}", "called": test.get("called"),
               "category": "laboratory" if visit["id"] in test else "vital-signs"}
        row.update({end: f"{test[end]} {unit}" for end in ("low", "high") if end in test})
        if "/" in value:
            row["systolic"], row["diastolic"] = (f"{part} {unit}" for part in value.split("/"))
            row["upper"], row["lower"] = "8480-6 Systolic blood pressure", "8462-4 Diastolic blood pressure"
        else:
            row["measured" if unit else "said"] = f"{value} {unit}" if unit else value
        yield row


def reports() -> Iterator[Json]:
    """The visits with laboratory results, and references to these."""
    for visit in rows("VISITS"):
        results = [made("Observation", f"{visit['id']}-{test['LOINC'].split()[0]}")
                   for test in rows("TESTS") if visit["id"] in test]
        if results:
            yield {**visit, "results": results}


def prescriptions() -> Iterator[Json]:
    """The rows of MEDICATIONS, with how much that is in all, and whether it is for long."""
    for row in rows("MEDICATIONS"):
        (number, unit), days = row["dose"].split(), int(row["days"])
        yield {**row, "amount": f"{int(number) * int(row['times']) * days} {unit}", "supply": f"{days} d",
               "status": "active" if days >= 30 else "completed"}


def fills() -> Iterator[Json]:
    """A row for each fill of a prescription: the first when it was written, then whenever it ran out."""
    for row in prescriptions():
        for place, fill in enumerate(row["fills"].split()):
            date = datetime.date.fromisoformat(row["written"]) + place * datetime.timedelta(int(row["days"]))
            yield {**row, "prescription": row["id"], "id": fill, "filled": str(date)}


def documents() -> Iterator[Json]:
    """The rows of DOCUMENTS, with their bytes."""
    for row in rows("DOCUMENTS"):
        text, title = row["text"], row["type"].partition(" ")[2]
        data = pdf(f"{title}\n\n{text}") if row["format"] == "application/pdf" else text.encode()
        number = {"system": "urn:ietf:rfc:3986", "value": f"urn:oid:2.16.840.1.113883.19.5.{row['id']}"}
        yield {**row, "title": title, "size": len(data), "data": base64.b64encode(data).decode(),
               "number": number}


def pdf(text: str) -> bytes:
    """ASCII text as a PDF of one page: header, objects, where each begins, trailer (ISO 32000-1, 7.5)."""
    lines = re.sub(r"([\\()])", r"\\\1", text).splitlines()
    drawing = "BT /F1 10 Tf 14 TL 54 750 Td\n" + "".join(f"({line}) '\n" for line in lines) + "ET"
    objects = ("<< /Type /Catalog /Pages 2 0 R >>", "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
               "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources 6 0 R >>",
               f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
               "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>", "<< /Font << /F1 5 0 R >> >>")
    body, places = "%PDF-1.4\n", "0000000000 65535 f \n"
    for number, content in enumerate(objects, 1):
        places += f"{len(body):010} 00000 n \n"
        body += f"{number} 0 obj\n{content}\nendobj\n"
    size = len(objects) + 1
    return (f"{body}xref\n0 {size}\n{places}trailer\n<< /Size {size} /Root 1 0 R >>\n"
            f"startxref\n{len(body)}\n%%EOF\n").encode("ascii")


DERIVED = {rows_of.__name__: rows_of for rows_of in (measurements, reports, prescriptions, fills, documents)}
_MOVES = re.compile(r"(\S+?)=((?:[\w/-]+\()*'[^']*'\)*|\S+)")
# Type | table of FACTS, or function | what R4 has.
RECORDS = """\
Patient | PATIENTS | id=smart(id) active=true gender=gender birthDate=born managingOrganization=CLINIC
    extension.0.url=us-core('race') extension.0.extension.0.url='ombCategory' .valueCoding=coding(CDC(race))
    extension.0.extension.1.url='text' .valueString=text(CDC(race)) extension.1.url=us-core('ethnicity')
    extension.1.extension.0.url='ombCategory' .valueCoding=coding(CDC('2186-5 Not Hispanic or Latino'))
    extension.1.extension.1.url='text' .valueString='Not Hispanic or Latino'
    extension.2.url=us-core('birthsex') .valueCode=sex identifier.0.use='usual'
    .type=v2-0203('MR Medical record number') .value=id .system='http://hospital.smarthealthit.org'
    name.0.use='official' .family=family .text=name name.0.given.0=given .1=initial telecom.0.system='phone'
    .value=phone .use='mobile' telecom.1.system='email' .value=email address.0.use='home' .city=city
    .state='OK' .postalCode=zip .country='USA' address.0.line.0=street
    communication.0.language=BCP47('en-US English (United States)')
RelatedPerson | - | id='daniel-adams-amy-shaw' active=true patient=Patient('Amy') name.0.family='Adams'
    .text='Daniel Adams' name.0.given.0='Daniel' relationship.0=v3-RoleCode('FTH father')
Practitioner | - | id='smart-clinician' active=true name.0.family='Clinician' .text='Clara Clinician'
    name.0.given.0='Clara' identifier.0.system='http://hl7.org/fhir/sid/us-npi' .value='1234567893'
PractitionerRole | - | active=true practitioner=DOCTOR organization=CLINIC
    code.0=NUCC('208D00000X General Practice Physician') location.0=Location('1')
    specialty.0=NUCC('208D00000X General Practice Physician') telecom.0.system='phone' .value='918-555-0100'
Organization | - | id='smart-clinic' active=true name='SMART Example Clinic' type.0=organization-type('prov')
Organization | - | id='smart-insurer' active=true name='Example Health Plan' type.0=organization-type('pay')
Location | - | status='active' name='SMART Example Clinic' type.0=v3-RoleCode('OF Outpatient facility')
    telecom.0.system='phone' .value='918-555-0100' address.line.0='1 Main St' address.city='Tulsa' .state='OK'
    .postalCode='74117' managingOrganization=CLINIC
Condition | PROBLEMS | clinicalStatus=condition-clinical('active')
    verificationStatus=condition-ver-status('confirmed') category.0=condition-category('problem-list-item')
    category.0=US/condition-category(concern) code=SNOMED(problem) subject=Patient(who) onsetDateTime=since
    recordedDate=since
AllergyIntolerance | ALLERGIES | clinicalStatus=allergyintolerance-clinical('active')
    verificationStatus=allergyintolerance-verification('confirmed') code=SNOMED(allergen)
    code.coding.1=coding(NDFRT(class)) patient=Patient(who) recordedDate=since type=type category.0=of
    criticality=risk reaction.0.manifestation.0=SNOMED(reaction) reaction.0.severity=severity
Immunization | IMMUNIZATIONS | status=status vaccineCode=CVX(vaccine) patient=Patient(who)
    occurrenceDateTime=date primarySource=true statusReason=v3-ActReason(refused)
Observation | SMOKING | status='final' category.0=observation-category('social-history')
    code=LOINC('72166-2 Tobacco smoking status') subject=Patient(who) effectiveDateTime=date issued=noon(date)
    valueCodeableConcept=SNOMED(smokes)
MedicationRequest | prescriptions | status=status intent='order' subject=Patient(who) requester=DOCTOR
    medicationCodeableConcept=RXNORM(medicine) authoredOn=written dosageInstruction.0.text=directions
    dosageInstruction.0.doseAndRate.0.doseQuantity=quantity(dose)
    dosageInstruction.0.timing.repeat.frequency=json(times) .period=1 .periodUnit='d'
    dispenseRequest.quantity=quantity(amount) .expectedSupplyDuration=quantity(supply)
MedicationStatement | prescriptions | status=status subject=Patient(who) dateAsserted=written
    medicationCodeableConcept=RXNORM(medicine) effectivePeriod.start=written basedOn.0=MedicationRequest(id)
MedicationAdministration | prescriptions | status='completed' subject=Patient(who) effectiveDateTime=written
    medicationCodeableConcept=RXNORM(medicine) request=MedicationRequest(id) dosage.text=directions
    .dose=quantity(dose)
MedicationDispense | fills | status='completed' subject=Patient(who) whenHandedOver=filled
    medicationCodeableConcept=RXNORM(medicine) daysSupply=quantity(supply) quantity=quantity(amount)
    authorizingPrescription.0=MedicationRequest(prescription)
Encounter | VISITS | status='finished' class=coding(v3-ActCode('AMB ambulatory'))
    type.0=SNOMED('185349003 Encounter for check up') subject=Patient(who) period.start=date .end=date
    participant.0.individual=DOCTOR location.0.location=Location('1') serviceProvider=CLINIC
Observation | measurements | status='final' category.0=observation-category(category) code=LOINC(code)
    code.text=called code.coding.1=coding(LOINC(second)) subject=Patient(who) effectiveDateTime=date
    encounter=Encounter(visit) valueQuantity=quantity(measured) valueCodeableConcept.text=said
    referenceRange.0.low=quantity(low) .high=quantity(high) component.0.code=LOINC(upper)
    .valueQuantity=quantity(systolic) component.1.code=LOINC(lower) .valueQuantity=quantity(diastolic)
DiagnosticReport | reports | status='final' category.0=v2-0074('LAB Laboratory')
    category.1=observation-category('laboratory') code=LOINC('11502-2 Laboratory report') subject=Patient(who)
    encounter=Encounter(id) effectiveDateTime=date issued=noon(date) performer.0=CLINIC result=results
Procedure | PROCEDURES | status='completed' code=SNOMED(procedure) subject=DANIEL encounter=Encounter(visit)
    performedDateTime=date(visit)
ImagingStudy | IMAGES | status='available' subject=DANIEL encounter=Encounter(visit)
    identifier.0.system='urn:dicom:uid' .value=oid(uid) started=date(visit) modality.0=coding(DICOM(modality))
    numberOfSeries=1 numberOfInstances=1 description=description endpoint.0.reference='Endpoint/smart-imaging'
    series.0.uid=series(uid) .number=1 .modality=coding(DICOM(modality)) .numberOfInstances=1
Endpoint | - | id='smart-imaging' status='active' payloadType.0.text='DICOM'
    connectionType=coding(endpoint-connection-type('dicom-wado-rs')) address='https://imaging.example/wado-rs'
Binary | documents | contentType=format data=data securityContext=DANIEL
DocumentReference | documents | status='current' subject=DANIEL type=LOINC(type) masterIdentifier=number
    identifier.0=number date=noon(date(visit)) author.0=DOCTOR
    category.0=US/us-core-documentreference-category('clinical-note') description=text
    content.0.attachment.contentType=format .url=binary(id) .title=title .size=size
    .creation=noon(date(visit)) content.0.format=coding(IHE('urn:ihe:iti:xds:2017:mimeTypeSufficient'))
    context.encounter.0=Encounter(visit)
Coverage | - | status='active' type=v3-ActCode('EHCPOL extended healthcare') subscriberId='S4S-1288992'
    beneficiary=DANIEL payor.0=INSURER period.start='2008-01-01' relationship=subscriber-relationship('self')
    class.0.type=coverage-class('plan') .value='senior' .name='Example Senior Plan'
ExplanationOfBenefit | BILLS | status='active' type=claim-type('professional') use='claim' patient=DANIEL
    created=created insurer=INSURER provider=DOCTOR outcome='complete' insurance.0.focal=true
    .coverage=Coverage('1') item.0.sequence=1 .productOrService=SNOMED('185349003 Encounter for check up')
    .net=usd(billed) .servicedDate=date(visit) item.0.encounter.0=Encounter(visit)
    total.0.category=adjudication('submitted') .amount=usd(billed) total.1.category=adjudication('benefit')
    .amount=usd(paid)
CarePlan | - | status='active' intent='plan' subject=DANIEL period.start='2009-12-01'
    category.0=US/careplan-category('assess-plan') careTeam.0=CareTeam('1') goal.0=Goal('1')
    addresses.0=Condition('19') text.status='generated'
    .div='<div xmlns="http://www.w3.org/1999/xhtml">Less salt, and a walk each day.</div>'
CareTeam | - | status='active' subject=DANIEL period.start='2009-12-01' participant.0.member=DOCTOR
    participant.0.role.0=SNOMED('446050000 Primary care provider') participant.1.member=DANIEL
    participant.1.role.0=SNOMED('116154003 Patient')
Goal | - | lifecycleStatus='active' description.text='Blood pressure below 140/90' subject=DANIEL
    startDate='2009-12-01' target.0.dueDate='2010-06-01'
Device | - | status='active' type=SNOMED('14106009 Cardiac pacemaker') patient=DANIEL
    udiCarrier.0.deviceIdentifier='09504000059118' distinctIdentifier='A9999XYZ100T0474'
    udiCarrier.0.carrierHRF='(01)09504000059118(11)050101(17)150101(10)7654321D(21)10987654d321'
    manufactureDate='2005-01-01' expirationDate='2015-01-01' lotNumber='7654321D' serialNumber='10987654d321'
Provenance | - | target.0=DocumentReference('1') recorded='2009-04-28T12:00:00Z'
    agent.0.type=provenance-participant-type('author') .who=DOCTOR .onBehalfOf=CLINIC
    agent.1.type=US/us-core-provenance-participant-type('transmitter') .who=CLINIC
Provenance | - | id='smart-Provenance-2' target.0=DiagnosticReport('1') recorded='2008-07-11T12:00:00Z'
    agent.0.who=CLINIC .type=US/us-core-provenance-participant-type('transmitter')
Questionnaire | - | url='https://smart.example/Questionnaire/falls' name='Falls' title='Falls' status='active'
    item.0.linkId='1' .text='Any falls this year?' .type='boolean' item.1.linkId='2' .text='How often?'
    .type='integer'
QuestionnaireResponse | - | questionnaire='https://smart.example/Questionnaire/falls' status='completed'
    subject=DANIEL author=DANIEL authored='2009-12-01T12:00:00Z' item.0.linkId='1'
    .text='Any falls this year?' item.0.answer.0.valueBoolean=true item.1.linkId='2' .text='How often?'
    item.1.answer.0.valueInteger=2"""


def moved(holder: Json, moves: str) -> Json:
    """Elements made of those of a resource, of a part of one, or of a row: new=old, both paths, a number is a
    place in a list; .new stands beside the one before. Old may also be 'text', a number, true, or KIND(old):
    see MAKERS and `made`. What is not there makes nothing.

    >>> moved({"total": [{"amount": 7}], "to": "Al"}, "cost=total.0.amount party.0.name=to .plan=Goal('1')")
    {'cost': 7, 'party': [{'name': 'Al', 'plan': {'reference': 'Goal/smart-Goal-1'}}]}
    """
    elements: Json = {}
    for name, rest, take in _understood(moves):
        value = take(holder)
        if value is not None:
            elements[name] = put(elements.get(name), rest, value)
    return elements


@functools.cache
def _understood(moves: str) -> list[tuple[str, list[str], Callable[[Any], Any]]]:
    """Word by word of `moved`: the element a value goes to, the path in it, what takes it from a holder."""
    path, words = "", []
    for new, old in _MOVES.findall(moves):
        path = path.rpartition(".")[0] + new if new[0] == "." else new
        name, *rest = path.split(".")
        words.append((name, rest, taker(old)))
    return words


def taker(old: str) -> Callable[[Any], Any]:
    """What takes a value, as `moved` names it, from a holder; None if it is not there."""
    kind, bracket, rest = old.partition("(")
    if old[0] == "'" or old == "true" or old.isdigit():
        constant = old[1:-1] if old[0] == "'" else json.loads(old)
        return lambda holder: constant
    if bracket:
        take, make = taker(rest[:-1]), MAKERS.get(kind) or functools.partial(made, kind)
        return lambda holder: None if (value := take(holder)) is None else make(value)
    if "." not in old:
        return operator.methodcaller("get", old)
    return lambda holder: functools.reduce(
        lambda value, step: value and (value[int(step)] if step.isdigit() else value.get(step)),
        old.split("."), holder)


def put(whole: Any, path: Sequence[str], value: Any) -> Any:
    """A copy of an object or list, or a new one, with a value at a path in it."""
    if not path:
        return value
    step, *rest = path
    if not step.isdigit():
        return {**(whole or {}), step: put((whole or {}).get(step), rest, value)}
    items, place = list(whole or ()), int(step)
    items[place:place + 1] = [put(items[place] if place < len(items) else None, rest, value)]
    return items


@functools.cache
def made(kind: str, text: str) -> Json:
    """A reference to a sample of a type, or, of "code display", a CodeableConcept of a code system."""
    if kind.isalpha() and kind[0].isupper() and kind not in SYSTEMS:
        return {"reference": f"{kind}/smart-{kind}-{text}"}
    code, _, display = text.partition(" ")
    system = US + "CodeSystem/" + kind[3:] if kind.startswith("US/") else SYSTEMS.get(kind, HL7 + kind)
    return {"coding": [coding(system, code, display)], **({"text": display} if display else {})}


def coding(system: str, code: str, display: str = "") -> Json:
    """A FHIR Coding."""
    return {"system": system, "code": code, **({"display": display} if display else {})}


def quantity(text: str) -> Json:
    """A FHIR Quantity from a number and a UCUM unit. The unit 1 is not shown to people."""
    number, unit = text.split()
    shown = {"unit": unit} if unit != "1" else {}
    return {"value": json.loads(number), **shown, "system": "http://unitsofmeasure.org", "code": unit}


MAKERS: dict[str, Callable[[Any], Any]] = {
    "Patient": {row["given"]: {"reference": f"Patient/smart-{row['id']}"} for row in rows("PATIENTS")}.get,
    "date": {row["id"]: row["date"] for row in rows("VISITS")}.get, "noon": "{}T12:00:00Z".format,
    "coding": lambda concept: concept["coding"][0], "json": json.loads, "quantity": quantity,
    "usd": lambda amount: {"value": float(amount), "currency": "USD"}, "oid": "urn:oid:{}".format,
    "series": "{}.1".format, "binary": "Binary/smart-Binary-{}".format, "smart": "smart-{}".format,
    "us-core": (US_CORE + "{}").format, "text": operator.itemgetter("text")}


# The versions. Here, and nowhere else, stands how STU3 differs from R4, and DSTU2 from STU3.
# Of a version, first: types, perhaps "at" a path inside | what `moved` does there ("-=" takes away; if it
# does nothing, the version lacks the types). Second: what is then written otherwise.
def adapt(resources: list[Json], earlier: tuple[str, Sequence[tuple[str, str]]]) -> list[Json]:
    """Resources as the version before theirs has them; those given are changed on the way."""
    for types_and_path, moves in table(earlier[0]):
        types, _, path = types_and_path.partition(" at ")
        holders = [resource for resource in resources if resource["resourceType"] in types.split()]
        for holder in within(holders, path) if path else holders:
            elements = moved(holder, moves)
            for name in {end.split(".")[0] for pair in _MOVES.findall(moves) for end in pair}:
                holder.pop(name, None)
            holder.update(elements)
            holder.pop("-", None)
        if not moves:
            resources = [resource for resource in resources if resource["resourceType"] not in types.split()]
    text = json.dumps(resources)
    for texts in earlier[1]:
        text = text.replace(*texts)
    return list(json.loads(text))


STU3 = ("""\
AllergyIntolerance Condition | clinicalStatus=clinicalStatus.coding.0.code
    verificationStatus=verificationStatus.coding.0.code assertedDate=recordedDate
Binary | content=data
CareTeam at participant | role=role.0
Coverage | grouping.plan=class.0.value grouping.planDisplay=class.0.name
Device | udi=udiCarrier.0 -=distinctIdentifier -=serialNumber
DiagnosticReport | category=category.0 performer.0.actor=performer.0
DiagnosticReport ImagingStudy Observation Procedure | context=encounter
DocumentReference at context | encounter=encounter.0
DocumentReference | created=date indexed=date -=category
ExplanationOfBenefit at item | net=net service=productOrService
ExplanationOfBenefit | insurance.coverage=insurance.0.coverage outcome=remittance-outcome(outcome) -=use
    totalCost=total.0.amount totalBenefit=total.1.amount
Goal | status='in-progress' -=lifecycleStatus target=target.0
ImagingStudy | uid=identifier.0.value availability='ONLINE' modalityList=modality patient=subject -=status
ImagingStudy at series | uid=oid(uid)
Immunization | date=occurrenceDateTime notGiven=status status='completed'
    explanation.reasonNotGiven.0=statusReason
Location RelatedPerson | type=type.0 relationship=relationship.0
MedicationAdministration MedicationRequest | prescription=request requester.agent=requester
MedicationRequest at dosageInstruction | doseQuantity=doseAndRate.0.doseQuantity
MedicationStatement | taken='y'
Provenance at agent | role.0=type whoReference=who onBehalfOfReference=onBehalfOf
QuestionnaireResponse | questionnaire=Questionnaire('1')""", (
    (f'{US}CodeSystem/us-core-provenance-participant-type", "code": "transmitter',
     HL7 + 'provenance-participant-role", "code": "informant'),
    (HL7 + "provenance-participant-type", HL7 + "provenance-participant-role"),
    (HL7 + "v2-", "http://hl7.org/fhir/v2/"), (HL7 + "v3-", "http://hl7.org/fhir/v3/"),
    (HL7 + "claim-type", "http://hl7.org/fhir/ex-claimtype"), ('"code": "pay"', '"code": "ins"'),
    (HL7 + "subscriber-relationship", "http://hl7.org/fhir/policyholder-relationship"),
    (IHE, "urn:oid:1.3.6.1.4.1.19376.1.2.3"), (HL7, "http://hl7.org/fhir/"),
    ('"currency": "', '"system": "urn:iso:std:iso:4217", "code": "'),
    ('"notGiven": "not-done"', '"notGiven": true'), ('"notGiven": "completed"', '"notGiven": false')))
DSTU2 = ("""\
Coverage Endpoint ExplanationOfBenefit PractitionerRole |
AllergyIntolerance | recordedDate=assertedDate category=category.0 status=clinicalStatus substance=code
    -=verificationStatus
Binary CarePlan ImagingStudy RelatedPerson | -=securityContext -=intent -=careTeam -=context -=endpoint
    -=active
CareTeam | category.0=ARGONAUT('careteam Care Team')
Condition Observation | dateRecorded=assertedDate category=category.0
Condition Encounter MedicationAdministration MedicationDispense MedicationRequest MedicationStatement
    | patient=subject
Device | udi=udi.carrierHRF status='available' expiry=expirationDate
DiagnosticReport | performer=performer.0.actor category=category category.coding.1=coding(SECTIONS('LAB'))
DiagnosticReport Observation Procedure | encounter=context
DocumentReference at content | format.0=format
Encounter | class='ambulatory'
Goal | description=description.text targetDate=target.dueDate
Immunization | wasNotGiven=notGiven reported=primarySource
MedicationAdministration at dosage | quantity=dose
MedicationAdministration | effectiveTimeDateTime=effectiveDateTime
MedicationRequest at dosageInstruction.timing.repeat | periodUnits=periodUnit
MedicationRequest | dateWritten=authoredOn prescriber=requester.agent -=intent
MedicationStatement | supportingInformation=basedOn -=taken
Organization | type=type.0
Patient Practitioner RelatedPerson at name | family.0=family
Practitioner RelatedPerson | name=name.0
Provenance at agent | role=role.0.coding.0 actor=whoReference -=onBehalfOfReference
Questionnaire | status='published' group.linkId='falls' group.title=title group.question=item -=url -=name
QuestionnaireResponse | group.linkId='falls' group.question=item""", (
    (US_CORE, "http://fhir.org/guides/argonaut/StructureDefinition/argo-"),
    (US + "CodeSystem/careplan-category", ARGONAUT), (US + "CodeSystem/condition-category", ARGONAUT),
    ('http://hl7.org/fhir/condition-category", "code": "problem-list-item', ARGONAUT + '", "code": "problem'),
    (DICOM, "http://nema.org/dicom/dicm"), ("MedicationRequest", "MedicationOrder"),
    ('"resourceType": "CareTeam"', '"resourceType": "CarePlan"'),
    ('"criticality": "low"', '"criticality": "CRITL"'), ('"reported": true', '"reported": false'),
    (f'"{CDC_RACE}", "code": "2186-5"', '"http://hl7.org/fhir/v3/Ethnicity", "code": "2186-5"'),
    (CDC_RACE, "http://hl7.org/fhir/v3/Race")))
STEPS_FROM_R4 = {"r4": (), "stu3": (STU3,), "dstu2": (STU3, DSTU2)}


# ######################################################################## 21 messages and JSON

LAST_SECOND = calendar.timegm((9999, 12, 31, 23, 59, 59))  # that a calendar can write
LAST_NOW = calendar.timegm((9990, 1, 1, 0, 0, 0))          # for the clock: approvals end up to 2 years on


def moment(seconds: float) -> datetime.datetime:
    """A Unix time, UTC. Windows' own calendar ends in the year 3000; this one doesn't."""
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    return epoch + datetime.timedelta(seconds=int(seconds))


def printable(text: str) -> str:
    """A text on one line: a name in data or in a folder steers no terminal, and writes no line of its own."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def excerpt(text: str) -> str:
    """A text or, of a long one, its two ends. Whole words: nothing would know half a secret, to hide it."""
    if len(text) <= 2000:
        return text
    return f"{text[:900].rpartition(' ')[0]} ... {text[-900:].partition(' ')[2]}"


@functools.lru_cache(maxsize=1000)
def http_date(seconds: float) -> str:
    """A Unix time as HTTP writes it: Thu, 31 May 2018 22:48:43 GMT (RFC 9110 section 5.6.7)."""
    return email.utils.format_datetime(moment(seconds), usegmt=True)


@remembered(4)
def is_loopback(host: str) -> bool:
    """Whether a host name or address means this very machine."""
    host = host.strip("[]").lower()
    return bool(re.fullmatch(r"::1|(.*\.)?localhost|127(\.\d{1,3}){3}", host))


def same_address(one: str, other: str) -> bool:
    """Whether two URLs are one: a slash at the end doesn't count, and loopback's names are all the same."""
    loopback = r"^(https?://)(localhost|127\.0\.0\.1|\[::1\])(?=[:/]|$)"
    return len({re.sub(loopback, r"\1loopback", plain_address(url)) for url in (one, other)}) == 1


def plain_address(url: str) -> str:
    """A URL without what doesn't count (RFC 3986 section 6.2): capitals in scheme and host, the scheme's own
    port, slashes at the end. That is how browsers write a name in Host and Origin."""
    url = re.sub("^[^/]*//[^/]*", lambda origin: origin[0].lower(), url.rstrip("/"))
    return re.sub(r"^(http://[^/]*):80(?=/|$)|^(https://[^/]*):443(?=/|$)", r"\1\2", url)


# An app's private scheme should be its maker's domain name, backwards (RFC 8252 section 7.1), so one with a
# period is an app's. Without, an app that registers itself gets only these:
APP_SCHEMES = frozenset((
    "cursor", "vscode", "vscode-insiders", "windsurf",  # editors, whose extensions register themselves so
    "exp",                                              # Expo Go, in which React Native apps are developed
    "capacitor", "ionic",                               # where apps of these frameworks have their own pages
    "smartapp"))                                        # the Swift-SMART framework's
# S4S's old apps have others, which whoever runs this server may list: any but those that browsers and systems
# act on by themselves, or let any web page act on (web+..., HTML's safelist for registerProtocolHandler).
# javascript: would run in this server's name, ms-msdt: and search-ms: have run programs.
ACTED_UPON = (
    r"https?|wss?|s?ftps?|(java|vb|j|live)script|mocha|data|file|blob|about|filesystem|jar|view-source|"
    r"resource|res|wyciwyg|(google)?chrome.*|(moz|safari|webkit)-.*|firefox.*|edge|opera|brave|vivaldi|"
    r"devtools|feed|rss|cid|mid|urn|mailto|tel|callto|voicemail|sips?|s?ms|smsto|mms(to)?|rtsp|facetime.*|"
    r"skype|i?message|im|xmpp|matrix|ircs?|wtai|openpgp4fpr|bitcoin|ethereum|web\+.*|geo|maps|webcal|news|"
    r"nntp|gopher|magnet|ed2k|microsoft.*|ms-.*|.*-ms|search|bing[a-z]*|xbox.*|onenote.*|calculator|"
    r"outlook.*|hcp|its|mk|mhtml|shell|jnlps?|intent|content|android-app|package|market|itms.*|macappstores?|"
    r"g?help|man|info|applescript|shortcuts|workflow|(app-)?prefs|dict|ical|addressbook|music|photos(-.*)?|"
    r"podcasts?|videos|x-.*|ssh|telnet|rlogin|tn3270|vnc|rdp|ldaps?|smb|cifs|afp|nfs|(web)?davs?|fish|admin|"
    r"trash|computer|network|apturl|(apt|git|svn)(\+.*)?|snap|steam|z39\.50[rs]")


MAX_HEAD = 64 << 10          # bytes of a first line and headers
_HEADER_LINES = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
_ONCE = frozenset(("host", "content-length", "transfer-encoding", "authorization", "content-type", "expect"))


class BadRequest(Exception):
    """An HTTP message that can't be read. The connection closes: nobody knows where the next would begin."""
    def __init__(self, status: int, description: str):
        super().__init__(description)
        self.status = status


def too_large(most: int) -> BadRequest:
    """413 that tells the limit."""
    return BadRequest(413, f"the body is longer than {most} bytes")


# Deadlines: theory of operation.
#
# Nobody may hold a thread without end, by silence, by a byte a minute, or by reading nothing. So all that is
# read or written has a deadline: a moment, not seconds that each byte would begin anew; in real time, so that
# a test that moves the portal's clock cuts nobody off. After it an app gets a 408, or nothing if it had asked
# nothing; a FHIR server behind is told of as a 504.
#
# A thread wakes by its socket's timeout, set anew only where it differs much from the time left: waking early
# does no harm, it looks at the clock again. settimeout() would do for all, but polls before each system call,
# a quarter of the speed (if only Python tried to read first). So a plain socket blocks until the kernel wakes
# it (SO_RCVTIMEO). TLS reads in layers that know nothing of that, on Windows a socket is unusable after it,
# and what the kernel counts for writing begins anew, on some systems, with each byte read: these use
# settimeout(), the last once there is no room to write at once (MSG_DONTWAIT). A stop wakes threads by
# shutting their sockets; on Windows that wakes nobody (cpython issue 91913): a thread looks there each 0.2 s.
TIMED_OUT = (BlockingIOError, TimeoutError, socket.timeout)  # the last is TimeoutError too since Python 3.10
NO_DEADLINE, DO_NOT_WAIT = math.inf, -math.inf


class TimedSocket(io.RawIOBase):
    """A connected socket that is read and written until its `deadline`; then BadRequest 408. With the
    deadline DO_NOT_WAIT it reads what is there: None (io's word for "would block") if nothing is."""
    def __init__(self, connection: socket.socket, deadline: float = NO_DEADLINE):
        self.connection, self.deadline = connection, deadline
        self.idle = self.ended = False  # idle: between two requests, where a stop may end it
        self._plain = type(connection) is socket.socket
        self._by_kernel = self._plain and sys.platform != "win32"
        self._longest = 0.2 if sys.platform == "win32" else 3600.0  # seconds without a look at `ended`
        self._given = 0.0  # seconds that a call may wait, as last set
        self._count = 0    # bytes read
        connection.settimeout(None)  # whatever socket.setdefaulttimeout says

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self.deadline == DO_NOT_WAIT:
            return self._read_at_once(buffer)
        try:
            count = int(self._in_time(self.connection.recv_into, buffer))
            self._count += count
            return count
        except TimeoutError:
            raise BadRequest(408, "the request took too long to arrive")

    def tell(self) -> int:
        """How many bytes were read. A BufferedReader's own tell() is this, less what lies in its buffer."""
        return self._count

    def send(self, data: bytes) -> None:
        """Write all of it, or TimeoutError: it can't be told to somebody who doesn't read."""
        sent = 0
        if self._by_kernel:
            try:
                sent = self.connection.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            if sent == len(data):
                return
            self._by_kernel, self._given = False, 0.0
        left = memoryview(data)[sent:]
        while left:
            left = left[self._in_time(self.connection.send, left):]

    def handshake(self) -> None:
        """TLS's greetings, or TimeoutError: before them nobody can be told anything."""
        self._in_time(cast(Any, self.connection).do_handshake)

    def _in_time(self, call: Callable[..., Any], *arguments: Any) -> Any:
        while True:
            left = min(self.deadline - time.monotonic(), self._longest)
            if left <= 0:
                raise TimeoutError("the deadline has passed")
            if self.ended:
                raise ConnectionResetError("this server stops")
            if not left / 2 < self._given < left * 1.1:
                self._given = max(left, 0.001)
                if self._by_kernel:
                    timeval = struct.pack("ll", int(self._given), int(self._given % 1 * 1_000_000))
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
                else:
                    self.connection.settimeout(self._given)
            try:
                return call(*arguments)
            except TIMED_OUT:
                pass  # or a little before the deadline: see what the clock says

    def _read_at_once(self, buffer: Any) -> int | None:
        nothing_yet: type[OSError] = BlockingIOError
        if not self._plain:
            import ssl  # which is there already: this is its socket
            nothing_yet = ssl.SSLWantReadError
        try:
            if self._by_kernel:
                return self.connection.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            self._given = 0.0
            self.connection.settimeout(0)
            return self.connection.recv_into(buffer)
        except nothing_yet:
            return None

    def end(self) -> None:
        """Wake the thread that reads or writes: there is no more to come."""
        self.ended = True
        with contextlib.suppress(OSError):
            # Not SSLSocket's own shutdown, which takes the session away from the thread that uses it.
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)


class OpenSockets:
    """The open connections, to apps and to other servers, so that a stop can end them. Whoever closes one
    discards it first: a number that the system has given to the next one is never shut."""
    def __init__(self) -> None:
        self._open: set[TimedSocket] = set()
        self._ended = False
        self._lock = threading.Lock()

    def add(self, timed: TimedSocket) -> None:
        """A connection begins. After the end, it ends at once."""
        with self._lock:
            self._open.add(timed)
            if self._ended:
                timed.end()

    def discard(self, timed: TimedSocket) -> None:
        """A connection is about to be closed."""
        with self._lock:
            self._open.discard(timed)

    def end(self, only_idle: bool = False) -> None:
        """End all, and those to come; or only those that wait for the next request."""
        with self._lock:
            self._ended = not only_idle
            for timed in self._open:
                if timed.idle or not only_idle:
                    timed.end()


@remembered(40)  # a client sends the same lines again and again
def parse_headers(lines: bytes) -> Mapping[str, str]:
    """Header lines as name (lower case) -> value; BadRequest unless they are as RFC 9112 section 5 says."""
    if not _HEADER_LINES.fullmatch(lines):
        raise BadRequest(400, "a header line is malformed")
    if lines.count(b"\n") > 200:  # each is remembered (RecordedRequest), and takes more than its bytes
        raise BadRequest(431, "more than 200 header lines")
    headers: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t\r")
        if name in headers:
            if name in _ONCE:
                raise BadRequest(400, f"the header {name} is given twice")
            value = headers[name] + ("; " if name == "cookie" else ", ") + value
        headers[name] = value
    return headers


def read_headers(stream: io.BufferedReader[Any], most: int) -> dict[str, str]:
    """The header lines up to the empty one. RFC 9112 section 2.2 lets us take a bare LF for a line's end; but
    a server in front of us may not, and so see another request end there."""
    ahead = stream.peek()
    end = ahead.find(b"\r\n\r\n")  # mostly all of them are here already
    if 0 <= end <= most - 4 and not ahead.startswith(b"\r\n"):  # else that is the next message's
        return dict(parse_headers(stream.read(end + 4)[:-2]))
    lines, line = b"", b""
    while line != b"\r\n":
        lines += line
        line = stream.readline(most + 1)
        most -= len(line)
        if most < 0:
            raise BadRequest(431, f"the header is longer than {MAX_HEAD} bytes")
        if not line.endswith(b"\r\n"):
            raise BadRequest(400, "a header line, or the message within it, ends without CR LF")
    return dict(parse_headers(lines))


def read_body(stream: io.BufferedReader[Any], headers: Mapping[str, str], most: int,
              before: Callable[[], None] = lambda: None) -> bytes:
    """A body, as announced: by length or in chunks, never both, or two servers in a row may disagree on where
    it ends (RFC 9112 section 6.3); empty without either. `before` is called if it is to be read."""
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            raise BadRequest(400, "Content-Length and Transfer-Encoding exclude each other")
        if headers["transfer-encoding"].lower() != "chunked":
            raise BadRequest(501, "Transfer-Encoding: only chunked is understood")
        before()
        return read_chunks(stream, most)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18:
        raise BadRequest(400, "Content-Length: expected a number of bytes")
    if int(length) > most:
        raise too_large(most)
    before()
    body = stream.read(int(length))
    if len(body) < int(length):
        raise BadRequest(400, "the body is shorter than its Content-Length")
    return body


def read_chunks(stream: io.BufferedReader[Any], most: int) -> bytes:
    """A chunked body (RFC 9112 section 7.1); trailers are read and forgotten."""
    body = bytearray()
    while True:
        match = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r\n", stream.readline(1024))
        if not match:
            raise BadRequest(400, "a chunk's size is malformed")
        size = int(match[1], 16)
        if size == 0:
            read_headers(stream, MAX_HEAD)
            return bytes(body)
        if len(body) + size > most:
            raise too_large(most)
        chunk = stream.read(size + 2)
        if len(chunk) < size + 2 or not chunk.endswith(b"\r\n"):
            raise BadRequest(400, "a chunk is not as long as it says")
        body += chunk[:-2]


MAX_DEPTH = 100  # arrays and objects in each other: what is taken must come out again, however deep the stack


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _number(text: str) -> int:
    if len(text) > 1000:  # Python before 3.9.14 and 3.10.7 would take seconds over a longer one
        raise ValueError(f"a number of {len(text)} digits; expected 1000 at most")
    return int(text)


def _refuse_twins(members: list[tuple[str, Any]]) -> Json:
    value = dict(members)
    if len(value) < len(members):  # who judges the last must not send the first
        raise ValueError("two members of one name")
    return value


_JSON = json.JSONDecoder(  # for what strangers send
    object_pairs_hook=_refuse_twins, parse_constant=_refuse_constant, parse_int=_number)


def parse_json(data: bytes) -> Json:
    """Bytes as a JSON object (RFC 8259: no NaN); PortalError, which says what is wrong, if they are none."""
    too_deep = f"the JSON nests too deep; expected {MAX_DEPTH} levels at most"
    try:
        value = _JSON.decode(data.decode("utf-8"))
        # Half a character ("\ud800") is no text, 1e999 is no number that could be given back.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except RecursionError:
        raise PortalError("invalid_request", too_deep)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are such
        raise PortalError("invalid_request", f"the body is not JSON: {error}")
    need(isinstance(value, dict), "the body is JSON, but no object; expected one")
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [inner for values in inside for inner in values if isinstance(inner, (dict, list))]
    need(not level, too_deep)
    return cast(Json, value)


# FHIR's issue-type value set, where a status says nothing more particular.
ISSUE_CODES = {400: "invalid", 401: "login", 403: "forbidden", 404: "not-found", 409: "conflict",
               410: "deleted", 412: "conflict", 429: "throttled", 503: "transient", 504: "timeout"}


def outcome(error: PortalError) -> Json:
    """An error as FHIR says it."""
    other = "exception" if error.status >= 500 else "invalid"
    code = error.error if isinstance(error, FhirError) else ISSUE_CODES.get(error.status, other)
    return {"resourceType": "OperationOutcome", "issue": [
        {"severity": "error", "code": code, "diagnostics": error.description}]}


FHIR_TYPE = "application/fhir+json"
FHIR_TYPES = {"dstu2": "application/json+fhir"}  # where a version's media type is another
JSON_TYPES = ("application/fhir+json", "application/json+fhir", "application/json", "text/json", "json")
_ANY_JSON = frozenset(("*/*", "application/*", *JSON_TYPES))
_FHIRS_JSON = frozenset(JSON_TYPES) - {"application/json"}
# What fhirVersion in a media type may be (R4 http, "FHIR Version Parameter"). R4B asks R4's servers for 4.3.
MEDIA_VERSIONS = {"dstu2": ("1.0",), "stu3": ("3.0",), "r4": ("4.0", "4.3")}


@remembered(40)
def media_types(text: str, version: str) -> tuple[str, ...]:
    """The media types in an Accept header, less those that it refuses (q=0) or wants of another FHIR."""
    types = []
    for part in filter(str.strip, text.lower().split(",")):
        wanted = re.findall(r";\s*fhirversion\s*=\s*\"?(\d+\.\d+)", part)[:1]
        if not re.search(r";\s*q=0(\.0*)?\s*(;|$)", part) and {*wanted} <= {*MEDIA_VERSIONS[version]}:
            types.append(part.partition(";")[0].strip())
    return tuple(types)


def accepts(request: Request) -> str:
    """What a request takes: by _format, which browsers can set, else by Accept."""
    wanted = dict(request.pairs()).get("_format", "").replace(" ", "+")
    return wanted or request.headers.get("accept") or "*/*"


def fhir_type(request: Request, version: str = "r4") -> str:
    """The JSON type asked for, else the version's own; 406 if no JSON of this version will do."""
    accepted = media_types(accepts(request), version)
    if not _ANY_JSON.intersection(accepted):
        raise FhirError("not-supported", f"{accepts(request)}: only JSON is served ({FHIR_TYPE}), of FHIR "
                        f"{' and '.join(MEDIA_VERSIONS[version])}", 406)
    return "application/json" if accepted == ("application/json",) else FHIR_TYPES.get(version, FHIR_TYPE)


def take_parameters(request: Request, interaction: str) -> None:
    """Put what a POST's body asks for among the parameters of the address. _summary=true and text may bring
    all, as FHIR allows: they do, and so does count where no search can be counted. They are taken out, since
    a Bundle's link to itself names what was used."""
    if not (request.query or request.body):
        return
    pairs, possible = request.pairs(), "count, data, false, text, true"
    if request.body and request.method == "POST" and interaction in ("search", "everything"):
        pairs += request.form() if interaction == "search" else parameters_in(request.json())
    if summary := dict(pairs).get("_summary"):
        need(summary in possible.split(", "), f"_summary={summary}: expected one of {possible}", "value",
             kind=FhirError)
        if summary in ("text", "true") or (summary == "count" and interaction != "search"):
            pairs[:] = [pair for pair in pairs if pair[0] != "_summary"]


def parameters_in(body: Json) -> list[tuple[str, str]]:
    """The parameters in FHIR's Parameters, as which an operation takes them (R4 operations, "Executing")."""
    pairs, good = [], body.get("resourceType") == "Parameters"
    for parameter in as_list(body.get("parameter")):
        told = parameter if isinstance(parameter, dict) else {}
        values = [told[member] for member in told if member.startswith("value")]
        good = good and "name" in told and [type(value) in (str, int) for value in values] == [True]
        pairs += [(str(told.get("name")), str(value)) for value in values]
    need(good, "expected a Parameters resource, each parameter with a name and a value of a simple type",
         "invalid", kind=FhirError)
    return pairs


def fhir_response(request: Request, body: Json | str, status: int = 200, headers: Headers = (),
                  version: str = "r4") -> Response:
    """What was judged, a resource or Bundle, or its JSON text: in the type that `fhir_type` says (errors
    whatever is accepted), and as the parameters ask to see it."""
    media_type = fhir_type(request, version) if status < 300 else FHIR_TYPES.get(version, FHIR_TYPE)
    text = body if isinstance(body, str) else json.dumps(body)
    pairs = request.pairs()
    if pairs and text and not SHAPING.isdisjoint(dict(pairs)):
        with contextlib.suppress(RecursionError):  # too deep: it comes as it is
            text = reshaped(text, pairs, version)
    # no-store: else a browser answers the app from its cache, even after the token's end.
    headers = [("Cache-Control", "no-store"), *headers]
    return Response(status, text.encode("utf-8", "replace"), media_type, headers)


SHAPING = frozenset(("_elements", "_pretty", "_summary"))
# Comes with whatever _elements names: who reads on without it might misunderstand the rest.
ALWAYS_SHOWN = frozenset((
    "resourceType", "id", "meta", "implicitRules", "modifierExtension", "status", "clinicalStatus",
    "verificationStatus", "lifecycleStatus", "doNotPerform", "notPerformed", "notGiven", "wasNotGiven",
    "wasNotTaken", "taken", "notDone"))
_MARK = secrets.token_hex(16)  # of a decimal; drawn, since a text that held it would come out as no JSON


def reshaped(text: str, pairs: Sequence[tuple[str, str]], version: str) -> str:
    """JSON as _elements, _summary=data and _pretty ask to see it (FHIR search, "Elements", "Summary")."""
    given, names = dict(pairs), ",".join([value for name, value in pairs if name == "_elements"]).strip(",")
    hidden, indent = given.get("_summary") == "data" and "text", 2 if given.get("_pretty") == "true" else None
    wanted = ALWAYS_SHOWN.union(names.split(","))

    def shows(name: str) -> bool:
        # value is valueQuantity, too. FHIR's names are shorter than 64 characters; strangers may be long.
        stems = [name[:end.start()] for end in re.finditer("[A-Z]|$", name[:64])]
        return name != hidden and not (names and wanted.isdisjoint(stems))

    def cut(resource: Json) -> Json:
        shown = {name: value for name, value in resource.items() if shows(name.lstrip("_"))}
        if len(shown) < len(resource):  # marked: nobody must write it back
            tag = coding(HL7 + "v3-ObservationValue", "SUBSETTED")
            if version != "r4":
                tag["system"] = "http://hl7.org/fhir/v3/ObservationValue"
            meta = resource["meta"] if isinstance(resource.get("meta"), dict) else {}
            shown["meta"] = {**meta, "tag": [*elements(meta, "tag"), tag]}
        return shown

    # Decimals go through it as marked text, to come out as they were: FHIR's 1.10 is not 1.1.
    value = json.loads(text, parse_float=f"{_MARK}{{}}".format)
    if value["resourceType"] != "Bundle":
        value = cut(value)
    for entry in elements(value, "entry"):
        if isinstance(entry, dict) and isinstance(entry.get("resource"), dict):
            entry["resource"] = cut(entry["resource"])
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return re.sub(f'"{_MARK}([^"]+)"', r"\1", text)


def one_resource(asked: FhirRequest, text: str, headers: Headers, version: str) -> Response:
    """What a read gives: 304 if there is no text to send. A Binary comes as its bytes, whatever Accept says,
    unless FHIR's own JSON, or JSON and nothing else, is asked for by name (R4 Binary, "Serving Binary
    Resources")."""
    if not text:
        return Response(304, headers=[("Cache-Control", "no-store"), *headers])
    accepted = media_types(accepts(asked.request), version) if asked.type == "Binary" else JSON_TYPES
    if accepted != ("application/json",) and _FHIRS_JSON.isdisjoint(accepted):
        resource = json.loads(text)
        kind, data = resource.get("contentType"), resource.get("data", resource.get("content"))
        # Not multipart/: its parts would bring headers of their own, and browsers may forget ours.
        if isinstance(data, str) and re.fullmatch(
                r"(?=.{3,1000}$)(?!(?i:multipart))[\w.+-]+/[\w.+-]+ *(?:;[ -~]*)?", str(kind), re.ASCII):
            with contextlib.suppress(ValueError):  # it is not base64
                # sandbox: what somebody else wrote must not run as a page of this portal
                return Response(200, base64.b64decode(data), kind, [
                    ("Cache-Control", "no-store"), ("Content-Security-Policy", "sandbox"), *headers])
    return fhir_response(asked.request, text, 200, headers, version)


# ######################################################################## 22 signing

# JSON Web Signatures (RFC 7515). This server signs id_tokens with RS256; apps prove who they are with RS384
# or ES384, the two that SMART names. The arithmetic is the textbooks', on Python's own integers. It takes
# milliseconds, and how many tells something about the key: a production server leaves this to a library.


def sign_jwt(key: RsaKey, claims: Json) -> str:
    """A JSON Web Token: header, claims and an RS256 signature over both (RFC 7519 section 7.1)."""
    header = {"alg": "RS256", "kid": key.public_jwk()["kid"], "typ": "JWT"}
    parts = [json.dumps(part, separators=(",", ":")).encode("ascii") for part in (header, claims)]
    signed = ".".join(map(base64url, parts))
    return f"{signed}.{base64url(rsa_sign(key, 'RS256', signed.encode('ascii')))}"


class Jwt(NamedTuple):
    """A JSON Web Token as it came: nothing in it is true before its signature has been verified."""
    header: Json
    claims: Json
    signed: bytes
    signature: bytes


def read_jwt(text: str) -> Jwt:
    """Take a JWT apart; ValueError for what is none."""
    parts = text.split(".")
    try:
        header, claims = (_JSON.decode(base64url_bytes(part).decode("utf-8")) for part in parts[:2])
        signature = base64url_bytes(parts[2])
        json.dumps([header, claims], ensure_ascii=False).encode("utf-8")  # refuses half characters ("\ud800")
    except (ValueError, IndexError, RecursionError):
        raise ValueError("expected a JWT: three parts in base64url, joined by dots")
    if len(parts) != 3 or not isinstance(header, dict) or not isinstance(claims, dict):
        raise ValueError("expected a JWT whose header and claims are JSON objects")
    return Jwt(header, claims, ".".join(parts[:2]).encode("ascii"), signature)


def base64url_bytes(text: str) -> bytes:
    """base64url back to bytes; ValueError for anything that `base64url` would not have written."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64url(data) != text:
        raise ValueError(f"{text!r} is not base64url without padding")
    return data


def verify(jwk: Json, algorithm: str, message: bytes, signature: bytes) -> bool:
    """Whether a signature by one of KEY_TYPES is the key's. ValueError, with words, for a bad key."""
    if algorithm == "ES384":
        return es384_verify(jwk, message, signature)
    return rsa_verify(jwk, algorithm, message, signature)


def _jwk_number(jwk: Json, name: str) -> int:
    """A number in a JWK: big-endian, in base64url (RFC 7518 section 2). 0 if there is none."""
    text = jwk.get(name)
    return int.from_bytes(base64url_bytes(text) if isinstance(text, str) else b"", "big")


def _jwk_text(number: int) -> str:
    """A number as a JWK holds it."""
    return base64url(number.to_bytes((number.bit_length() + 7) // 8, "big"))


RSA_EXPONENT = 65537
RSA_HASHES = {  # the hash, and its name as it stands before the hash in a signature (RFC 8017 section 9.2)
    "RS256": (hashlib.sha256, bytes.fromhex("3031300d060960864801650304020105000420")),
    "RS384": (hashlib.sha384, bytes.fromhex("3041300d060960864801650304020205000430"))}


class RsaKey(NamedTuple):
    """A private RSA key: two primes, known to nobody else (RFC 8017 section 3.2)."""
    p: int
    q: int

    def public_jwk(self) -> Json:
        """The public half as a JWK. Its kid is a hash of the modulus: one key has one name everywhere."""
        modulus = _jwk_text(self.p * self.q)
        return {"kty": "RSA", "n": modulus, "e": _jwk_text(RSA_EXPONENT), "use": "sig", "alg": "RS256",
                "kid": base64url(hashlib.sha256(modulus.encode("ascii")).digest())}


def new_rsa_key(bits: int = 2048) -> RsaKey:
    """A new key. The primes are found by trying: one in 355 odd numbers of this size is one."""
    small = math.factorial(4000)  # has every smaller prime in it

    def prime() -> int:
        while True:
            number = secrets.randbits(bits // 2) | 3 << (bits // 2 - 2) | 1  # p * q gets all of its bits
            # Fermat's test. Composites that pass it can be made, but nobody gives us numbers: among those
            # that we draw ourselves one (a Carmichael number) is rarer than a bit that flips by itself.
            if math.gcd(number, small) == 1 and number % RSA_EXPONENT != 1 and all(
                    pow(base, number - 1, number) == 1 for base in (2, 3, 5, 7)):
                return number
    return RsaKey(prime(), prime())


def rsa_sign(key: RsaKey, algorithm: str, message: bytes) -> bytes:
    """RSASSA-PKCS1-v1_5 (RFC 8017 section 8.2.1), by way of the two primes, which is four times as fast."""
    length = ((key.p * key.q).bit_length() + 7) // 8
    padded = _padded_hash(algorithm, message, length)
    by_p = pow(padded, pow(RSA_EXPONENT, -1, key.p - 1), key.p)
    by_q = pow(padded, pow(RSA_EXPONENT, -1, key.q - 1), key.q)
    return (by_q + (by_p - by_q) * pow(key.q, -1, key.p) % key.p * key.q).to_bytes(length, "big")


def rsa_verify(jwk: Json, algorithm: str, message: bytes, signature: bytes) -> bool:
    """Whether a signature is the key's (RFC 8017 section 8.2.2). ValueError for a weak key or none."""
    modulus, exponent = _jwk_number(jwk, "n"), _jwk_number(jwk, "e")
    if not 2048 <= modulus.bit_length() <= 8192 or not 3 <= exponent < 1 << 64:
        raise ValueError("expected an RSA key of 2048 to 8192 bits (RFC 7518 section 3.3)")
    length, number = (modulus.bit_length() + 7) // 8, int.from_bytes(signature, "big")
    return (len(signature) == length and number < modulus
            and pow(number, exponent, modulus) == _padded_hash(algorithm, message, length))


def _padded_hash(algorithm: str, message: bytes, length: int) -> int:
    """A message's hash, padded to the length of the modulus (EMSA-PKCS1-v1_5, RFC 8017 section 9.2)."""
    make, name = RSA_HASHES[algorithm]
    end = b"\0" + name + make(message).digest()
    return int.from_bytes(b"\0\1" + end.rjust(length - 2, b"\xff"), "big")


# The curve P-384 (FIPS 186-4 appendix D.1.2.4): y^2 = x^3 - 3x + b modulo p; a point g of the prime order n.
P384_P = 2 ** 384 - 2 ** 128 - 2 ** 96 + 2 ** 32 - 1
P384_N = 0xffffffffffffffffffffffffffffffffffffffffffffffffc7634d81f4372ddf581a0db248b0a77aecec196accc52973
P384_B = 0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aef
P384_G = (
    0xaa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a385502f25dbf55296c3a545e3872760ab7,
    0x3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c00a60b1ce1d7e819d7a431d7c90ea0e5f, 1)
Point = tuple[int, int, int]  # x/z^2, y/z^3 (Jacobian coordinates add without dividing); z = 0: infinity


def es384_verify(jwk: Json, message: bytes, signature: bytes) -> bool:
    """Whether an ECDSA signature (r and s, 48 bytes each, RFC 7518 section 3.4) is the key's (FIPS 186-4
    section 6.4). ValueError for a key that is not a point of P-384."""
    x, y = _jwk_number(jwk, "x"), _jwk_number(jwk, "y")
    if jwk.get("crv") != "P-384" or max(x, y) >= P384_P or (y * y - x * (x * x - 3) - P384_B) % P384_P:
        raise ValueError("expected a point of the curve P-384 as x and y")
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    if len(signature) != 96 or not 0 < r < P384_N or not 0 < s < P384_N:
        return False
    inverse, hashed = pow(s, -1, P384_N), int.from_bytes(hashlib.sha384(message).digest(), "big")
    u1, u2 = hashed * inverse % P384_N, r * inverse % P384_N
    # u1 * g + u2 * key, both in one pass from the highest bit down (Shamir's trick).
    key, total = (x, y, 1), (1, 1, 0)
    sums = (total, P384_G, key, _add(P384_G, key))
    for bit in range(383, -1, -1):
        total = _add(_double(total), sums[(u1 >> bit & 1) + 2 * (u2 >> bit & 1)])
    return bool(total[2]) and (total[0] * pow(total[2], -2, P384_P) - r) % P384_P % P384_N == 0


def _double(point: Point) -> Point:
    """A point added to itself (Cohen, Miyaji and Ono 1998, for a = -3)."""
    x, y, z = point
    square, zz = y * y % P384_P, z * z % P384_P
    slope, mean = 3 * (x - zz) * (x + zz), 4 * x * square
    x3 = (slope * slope - 2 * mean) % P384_P
    return x3, (slope * (mean - x3) - 8 * square * square) % P384_P, 2 * y * z % P384_P


def _add(point: Point, other: Point) -> Point:
    """The sum of two points."""
    (x1, y1, z1), (x2, y2, z2) = point, other
    if not z1 or not z2:
        return other if not z1 else point
    zz1, zz2 = z1 * z1 % P384_P, z2 * z2 % P384_P
    u1, s1 = x1 * zz2 % P384_P, y1 * zz2 * z2 % P384_P
    width, height = (x2 * zz1 - u1) % P384_P, (y2 * zz1 * z1 - s1) % P384_P
    if not width:
        return (1, 1, 0) if height else _double(point)
    cube = width * width % P384_P
    mean, cube = u1 * cube % P384_P, cube * width % P384_P
    x3 = (height * height - cube - 2 * mean) % P384_P
    return x3, (height * (mean - x3) - s1 * cube) % P384_P, width * z1 * z2 % P384_P


# ######################################################################## 23 pages


class Markup(str):
    """Text that is HTML already. All other text is escaped when it enters a page."""


def escaped(child: Any) -> str:
    """What is in an element: markup as it is, lists one by one, None and False not at all; else escaped."""
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return "".join(map(escaped, child))
    return "" if child is None or child is False else html.escape(str(child))


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An HTML element. class_ is class, data_slide data-slide; True is a bare attribute, None and False none.

    >>> tag("input", class_="glyphbox", data_slide="<next>", required=True, checked=False)
    '<input class="glyphbox" data-slide="&lt;next&gt;" required>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            words.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    end = "" if name in ("input", "br", "meta") else f"{escaped(children)}</{name}>"
    return Markup(f"<{' '.join(words)}>{end}")


def card(title: str, *content: Any, class_: str = "card", **more: Any) -> Markup:
    """A part of a page, under its own heading."""
    return tag("section", tag("h2", title), *content, class_=class_, **more)


def facts(*pairs: tuple[Any, Any]) -> Markup:
    """A list of names and what they are; pairs with nothing are left out."""
    return tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in pairs if value])


def html_table(heads: Sequence[str], rows: Sequence[Markup]) -> Markup:
    """A table; a column of buttons has no head."""
    cells = [tag("th", head, scope="col") if head else tag("td") for head in heads]
    return tag("table", tag("thead", tag("tr", cells)), tag("tbody", rows))


def link(portal: Portal, path: str, text: str = "Apps you share with") -> Markup:
    """A link within the portal, which a reverse proxy may serve below a path."""
    return tag("a", text, href=urlsplit(portal.browser_base()).path + path)


def post_form(portal: Portal, request: Request, path: str, *content: Any, session_id: str = "",
              hidden: Iterable[tuple[str, str]] = (), **more: Any) -> Markup:
    """A form for `guarded_form`; `session_id` is that of a browser which only now gets its cookie."""
    pairs = ("form_token", form_token(session_id or browser_session(portal, request))), *hidden
    fields = [tag("input", type="hidden", name=name, value=value) for name, value in pairs]
    return tag("form", fields, *content, method="post", action=portal.browser_base(request) + path, **more)


def field(label: str, name: str, value: str, wrong: str = "", kind: str = "text", **more: Any) -> Markup:
    """An input with its label, and what is wrong with it, if anything is."""
    return tag("label", label, tag("input", type=kind, id=name, name=name, value=value, **more), alert(wrong))


def alert(wrong: str) -> Markup | None:
    """Beside a field: what is wrong with it."""
    return tag("span", wrong, class_="error", role="alert") if wrong else None


def what_is_wrong(error: PortalError | None, *names: str) -> dict[str, str]:
    """What an error says of each field: it begins with one's name. An error of no such field stays one."""
    name, _, told = error.description.partition(": ") if error else ("", "", "")
    if error and name not in names:
        raise error
    return {**dict.fromkeys(names, ""), name: told[:1].upper() + told[1:]}


def check_box(*label: Any, **attributes: Any) -> Markup:
    """A check box with its label."""
    return tag("label", tag("input", type="checkbox", **attributes), tag("span", *label), class_="choice")


def selection(label: str, name: str, choices: Iterable[tuple[str, str]], chosen: str = "",
              wrong: str = "") -> Markup:
    """A list to choose one of, as value and text."""
    options = [tag("option", text, value=value, selected=value == chosen) for value, text in choices]
    return tag("label", label, tag("select", options, id=name, name=name), alert(wrong))


# Where the texts can be read, besides the RFCs.
TEXTS = {"SMART": "https://hl7.org/fhir/smart-app-launch/app-launch.html",
         "FHIR": "https://hl7.org/fhir/http.html",
         "OpenID Connect Core": "https://openid.net/specs/openid-connect-core-1_0.html",
         "OpenID Connect Discovery": "https://openid.net/specs/openid-connect-discovery-1_0.html"}
_CITED = re.compile(rf"\bRFC (\d{{4}})(?: section (\d+(?:\.\d+)*))?|\b({'|'.join(TEXTS)})\b(?: App Launch)?")


def cited(text: str) -> Markup:
    """Words with each text that they cite as a link to it."""
    def linked(match: re.Match[str]) -> str:
        section = f"#section-{match[2]}" if match[2] else ""
        address = TEXTS.get(match[3]) or f"https://www.rfc-editor.org/rfc/rfc{match[1]}{section}"
        return tag("a", match[0], href=address)
    return Markup(_CITED.sub(linked, html.escape(text)))


# The light colours and the sizes, in SMART's names for them: what apps take over from here ("Styling").
LOOK = {"color_background": "#f2f5f7", "color_error": "#8a3200", "color_highlight": "#0a5a83",
        "color_modal_backdrop": "#f2f5f7", "color_success": "#0a5a83", "color_text": "#17242f",
        "dim_border_radius": ".7rem", "dim_font_size": "1.0625rem", "dim_spacing_size": "1.25rem",
        "font_family_body": "system-ui,sans-serif", "font_family_heading": "system-ui,sans-serif"}
LOOK_JSON = json.dumps(LOOK).encode()
LOOK_DIGEST = hashlib.sha256(LOOK_JSON).hexdigest()[:16]
# Light, dark and print; contrast is AA (4.5 to 1 for text, 3 to 1 for the edges of controls) in each.
STYLE = ":root{" + "".join(f"--{name}:{value};" for name, value in LOOK.items()) + """
color-scheme:light dark;--ink:var(--color_text);--quiet:#4d5e6b;--paper:#fff;--ground:var(--color_background);
--line:#cfd8de;--edge:#6b7d8a;--accent:var(--color_highlight);--on:#fff;--tint:#e4f0f7;
--warn:var(--color_error);--warm:#fdf1e7}@media screen and (prefers-color-scheme:dark){:root{--ink:#e6edf2;
--quiet:#a9b8c3;--paper:#19232c;--ground:#10171d;--line:#34434f;--edge:#8295a3;--accent:#86c9f0;--on:#08202f;
--tint:#1d3444;--warn:#ffb68e;--warm:#352419}}*{box-sizing:border-box}body{margin:0;
font:var(--dim_font_size)/1.55 var(--font_family_body);color:var(--ink);background:var(--ground);
overflow-wrap:anywhere}body>*{padding:1rem max(1rem,50% - 25rem)}main{padding-bottom:2rem}body>header,
header nav{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem}body>header{align-items:center;
background:var(--paper);border-bottom:1px solid var(--line)}header strong{flex:1 1 14rem;font-size:1.1rem}
header a{padding:.4rem 0}header strong::before{content:"";display:inline-block;width:.9em;height:.9em;
margin-right:.5em;border-radius:.25em .9em;background:var(--accent);vertical-align:-.08em}footer{
color:var(--warn);border-top:1px solid var(--line)}h1,h2,h3{font-family:var(--font_family_heading)}h1{
font-size:1.7rem;line-height:1.25;margin:.6em 0}h2{font-size:1.25rem;line-height:1.3;margin:0 0 .6em}h3{
font-size:1.0625rem;margin:1.3em 0 .4em}p,ul{margin:.6em 0}ul{padding-left:1.3rem}li{margin:.25em 0}a{
color:var(--accent)}:focus-visible{outline:3px solid var(--accent);outline-offset:2px}small,.quiet{
color:var(--quiet);font-size:.95rem}.card,.modal{background:var(--paper);border:1px solid var(--line);
border-radius:var(--dim_border_radius);padding:var(--dim_spacing_size);margin:0 0 var(--dim_spacing_size)}
.modal{border:2px solid var(--accent)}.card>:first-child,.card>label:first-of-type{margin-top:0}
.card>:last-child{margin-bottom:0}.note,.error{border-left:.3rem solid var(--accent);background:var(--tint);
padding:.6rem .9rem;margin:.9rem 0;border-radius:.2rem}.error{border-color:var(--warn);background:var(--warm)}
dl{display:grid;grid-template-columns:minmax(6rem,11rem) minmax(0,1fr);gap:.3rem 1rem;margin:.6em 0}dt{
color:var(--quiet)}dd{margin:0}label{display:block;margin:.9rem 0;font-weight:600}fieldset{border:0;padding:0;
margin:1.2rem 0}legend{padding:0;font-weight:600}input,select,textarea{font:inherit;font-weight:400;
color:inherit;background:var(--paper);border:1px solid var(--edge);border-radius:.4rem}
input:not([type=checkbox]),select,textarea{display:block;width:100%;max-width:26rem;min-height:2.75rem;
padding:.4rem .7rem;margin-top:.25rem}.choice{display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem;
margin:0;padding:.6rem 0;font-weight:400;border-bottom:1px solid var(--line)}.choice small{display:block}
input[type=checkbox]{width:1.4rem;height:1.4rem;margin:.1rem;accent-color:var(--accent)}button{font:inherit;
font-weight:600;min-height:2.75rem;padding:.5rem 1.3rem;margin:.8rem .6rem 0 0;cursor:pointer;
border:1px solid var(--accent);border-radius:.4rem;background:var(--accent);color:var(--on)}
button.btn-default,button[data-slide=back]{background:transparent;color:var(--accent)}button[data-patient-id]{
display:block;width:100%;max-width:26rem;text-align:left;background:var(--tint);color:var(--accent)}pre,code{
font:.9em/1.5 ui-monospace,monospace}pre{background:var(--ground);padding:.8rem;border-radius:.4rem;
white-space:pre-wrap;overflow:auto;margin:.5rem 0}table{border-collapse:collapse;width:100%;font-size:.95rem}
th,td{text-align:left;vertical-align:top;padding:.5rem .8rem .5rem 0;border-bottom:1px solid var(--line);
min-width:6.8rem}th:first-child,td:first-child{min-width:13rem}td button{margin:0;min-width:9rem}button.plain{
min-height:0;padding:0;margin:0;border:0;background:none;color:var(--accent);font-weight:400;
text-decoration:underline}button small{display:block;color:inherit;font-weight:400}.apart{
border-top:1px solid var(--line);margin-top:1.5rem}span.error{display:block;font-weight:400;max-width:26rem}
li.note{margin:.4em 0 .4em -1.2rem;list-style:none}time,h2 small{white-space:nowrap}tr[aria-current]{
background:var(--tint);box-shadow:0 0 0 .5rem var(--tint)}summary{cursor:pointer}.js section:not(.active),
button[data-slide]{display:none}.js button[data-slide]:not([hidden]){display:inline-block}
@media(max-width:48rem){table,tbody,tr,td,caption{display:block}thead{display:none}td{border:0;
padding:.1rem 0}tr{border-bottom:1px solid var(--line);padding:.6rem 0}tr:last-child{border:0}
td[data-label]::before{content:attr(data-label) ": ";color:var(--quiet)}dl{display:block}dd{margin:0 0 .6rem}}
@media print{:root{font-size:9pt}nav,button{display:none!important}.js section:not(.active){display:block}
body{background:none;line-height:1.3}body>*{padding:.2rem 0}.choice{padding:.15rem 0;break-inside:avoid}
fieldset{columns:2}}
"""


def page(portal: Portal, request: Request, title: str, *content: Any, status: int = 200,
         user: Row | None = None, back: str = "/", session_id: str = "", style: str = STYLE, script: str = "",
         brand: str = "") -> Response:
    """A page of the portal. A `user` who is signed in can sign out there, which leads `back`; `session_id` is
    for the cookie; `brand` says whose page it is, if not the portal's. It runs this style and script alone,
    which talks to this server alone; no site frames it, no cache keeps it."""
    name, who, sign_out = portal.settings.name, None, None
    head = tag("head", tag("meta", charset="utf-8"), tag("title", f"{title} - {name}"), tag(
        "meta", name="viewport", content="width=device-width, initial-scale=1"), tag("style", Markup(style)))
    nav = tag("nav", link(portal, "/", "Start"), link(portal, "/apps"), aria_label="Portal")
    if user:  # its form stands at the end: scripts look for a page's own form first
        button = tag("button", "Not you? Sign out", form="sign-out", class_="plain")
        who = tag("span", f"Signed in as {user['name']}. ", button, class_="quiet")
        sign_out = post_form(portal, request, "/logout", id="sign-out", hidden=[("next", back)])
    warning = "This is a test server with made-up patients. Enter no real person's data."
    body = tag("body", tag("header", tag("strong", brand or name), nav, who),
               tag("main", tag("h1", title), *content), tag("footer", warning, sign_out),
               script and tag("script", Markup(script)))
    text = "<!doctype html>" + tag("html", head, body, lang="en")

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    # No form-action: it would forbid the redirect that answers the consent.
    runs = f"script-src {digest(script)}; connect-src 'self'; " if script else ""
    policy = f"default-src 'none'; style-src {digest(style)}; {runs}base-uri 'none'; frame-ancestors 'none'"
    headers = [("Content-Security-Policy", policy), ("Referrer-Policy", "no-referrer"),
               ("Cache-Control", "no-store")]
    if session_id:
        headers.append(("Set-Cookie", set_cookie(portal, request, session_id)))
    return Response(status, text.encode("utf-8", "replace"), "text/html; charset=utf-8", headers)


def error_page(portal: Portal, error: PortalError, request: Request, route: Route | None) -> Response:
    """An error for the person at the browser: what was expected, what came, and what to read."""
    sent = [tag("li", tag("code", f"{name} = {value}")) for name, value in parse_qsl(request.query)]
    came = [tag("code", f"{request.method} {request.path}"), sent and tag("ul", sent)]
    told = [("What it does", what_it_does(route)), ("What to read", cited(route.spec))] if route else []
    details = facts(("What came", came), *told, ("Error code", tag("code", error.error)))
    return page(portal, request, "There is nothing here" if error.status == 404 else "This did not work",
                tag("p", cited(error.description), class_="error"), tag("div", details, class_="card"),
                tag("p", link(portal, "/", "To the start page")), status=error.status)


def what_it_does(route: Route) -> str:
    """The first paragraph of an endpoint's docstring."""
    return " ".join((route.endpoint.__doc__ or "").partition("\n\n")[0].split())


def sign_in_page(portal: Portal, request: Request, username: str, message: str, path: str) -> Response:
    """The form, then `path`; with a cookie for a browser that has none, for its form token to hang on."""
    session_id, asks = browser_session(portal, request) or new_session_id(), None
    with contextlib.suppress(PageError):  # nobody is asking, or not any more
        client, _ = pending_request(portal, dict(parse_qsl(urlsplit(path).query)).get("request", ""))
        asks = tag("p", f"{client.name} asks to see a health record. Sign in here and decide: the app "
                   "does not learn your password.")
    form = post_form(
        portal, request, "/login",
        field("User name", "username", username, autocomplete="username", required=True),
        field("Password", "password", "" if message else DEMO_PASSWORD, message, "password",
              autocomplete="current-password", required=True),
        tag("button", "Sign in", id="sign-in"), session_id=session_id, hidden=[("next", path)], class_="card")
    typing_replaces_it = "document.getElementById('password').onfocus = event => event.target.select();"
    return page(portal, request, "Sign in", asks, form, accounts(portal), status=401 if message else 200,
                session_id=session_id, script=typing_replaces_it)


def accounts(portal: Portal) -> Markup:
    """Who can sign in, how, and what each may open."""
    users = [(user["name"], [tag("code", user["username"]), " opens ", records_in_words(portal, user)])
             for user in some_users(portal)]
    others = portal.records.has_accounts and (
        " Every other patient signs in by id, with the same password, and opens that record.")
    return card("Test accounts", facts(*users), tag(
        "p", "Their password is ", tag("code", DEMO_PASSWORD), " unless fixtures gave them another.", others))


def some_users(portal: Portal, limit: int = 20) -> Sequence[Row]:
    """The first users."""
    return portal.state.rows("SELECT * FROM users ORDER BY rowid LIMIT ?", limit)


def records_in_words(portal: Portal, user: Row) -> str:
    """Whose records a user may open."""
    names = [] if user["any_patient"] else list(portal.patients_of(user["username"]).values())
    more = [f"{len(names) - MANY_PATIENTS} more"] if len(names) > MANY_PATIENTS else []
    return ", ".join(names[:MANY_PATIENTS] + more) or ("any record" if user["any_patient"] else "no record")


MANY_PATIENTS = 12  # more than this, and the picker has a search box
CONTINUE = tag("button", "Continue", type="button", data_slide="next")
BACK = tag("button", "Back", type="button", data_slide="back")
REFUSE = tag(
    "button", "Do not approve", class_="btn-default", name="decision", value="deny", formnovalidate=True)


def picker_page(portal: Portal, request: Request, user: Row, client: Client, request_id: str,
                patients: dict[str, str], text: str = "") -> Response:
    """Whose record: those of `patients`, found by `text` if any. A user who may open many can search."""
    nobody = f"{user['name']} may open no patient's record here."
    need(patients or text, nobody, "access_denied", 403, PageError)
    many = len(patients) > MANY_PATIENTS
    count = many and f"The first {MANY_PATIENTS} of {len(patients)} patients."
    if not patients:
        count = f"Nobody whose record you may open is called {text!r}."
    search = tag("form", tag("input", type="hidden", name="request", value=request_id),
                 field("Search by name or patient id", "q", text, kind="search"),
                 tag("button", "Search", class_="btn-default"),
                 action=f"{portal.browser_base(request)}/oauth/consent", role="search", class_="card")
    shown, own = list(patients)[:MANY_PATIENTS], portal.fhir_user(user["username"], None)
    born, buttons = portal.records.birth_dates(shown) if shown else {}, []
    for patient_id in shown:
        about = tag("small", own == f"Patient/{patient_id}" and "your own record; ",
                    "born ", tag("time", born.get(patient_id) or "on a day that is not known"))
        buttons.append(tag("button", patients[patient_id], about, name="patient_id", value=patient_id,
                           data_patient_id=patient_id))
    form = post_form(portal, request, "/oauth/consent", count and tag("p", count, role="status"), buttons,
                     tag("p", REFUSE, class_="apart"), hidden=[("request", request_id)], class_="card")
    asked = tag("p", f"{client.name} asks to see one person's health record. Choose whose. On the next page "
                "you decide what of it, and until when.")
    return page(portal, request, "Whose record?", asked, (text or many) and search, form,
                user=user, back=f"/oauth/consent?request={request_id}")


CATEGORY_WORDS = {  # what each category of the consent page covers, for the person who decides
    "patient": "Name, birth date, gender, address, phone, language, ethnicity.",
    "medications": "What was prescribed, dispensed, given or is taken, and how much of it.",
    "allergies": "What causes reactions, which ones, and how bad they were.",
    "immunizations": "Vaccines, and when they were given.",
    "problems": "Illnesses, complaints and findings, now and in the past.",
    "procedures": "Operations, examinations and treatments.",
    "vital-signs": "Blood pressure, pulse, temperature, weight, height and the like, over time.",
    "laboratory": "Blood, urine and other tests, and the reports on them.",
    "smoking": "Tobacco use, and other habits and circumstances that were noted.",
    "documents": "Letters and notes about care, and the files themselves.",
    "coverage": "Who insures, under which number, since when.",
    "explanation-of-benefit": "What was billed, what the insurance paid, and for which care.",
    "imaging": "Which pictures were taken, such as X-rays, and when.",
    "encounters": "Visits and stays: when, where, why, with whom.",
    "other": "Whatever else the record holds and is not named above."}
# The consent page's three steps, each an entry of the browser's history. Without this script all three stand
# below each other, as one plain form. A page that was loaded anew forgot what was confirmed.
CONSENT_SCRIPT = """
const form = document.getElementById('consent-carousel'), steps = form.querySelectorAll('section');
const unconfirmed = () => steps[1].querySelector('input[rel=confirm]:not(:checked)');
let at;
function show(step) {
  at = step > 1 && unconfirmed() ? 1 : step;
  steps.forEach((section, number) => section.classList.toggle('active', number === at));
}
form.classList.add('js');
show(form.querySelector('.error') ? 2 : history.state ?? 0);
window.addEventListener('popstate', event => show(event.state ?? 0));
form.addEventListener('click', event => {
  const button = event.target.closest('button[data-slide]');
  if (!button) return;
  if (button.hidden) return event.preventDefault();
  if (button.dataset.slide === 'back') return history.back();
  const missing = at === 1 && unconfirmed();
  if (missing) return missing.reportValidity();
  show(at + 1);
  history.pushState(at, '');
  steps[at].querySelector('h2').focus();
});
"""


def consent_page(portal: Portal, request: Request, user: Row, client: Client, details: Json, request_id: str,
                 patient_id: str | None, error: PortalError | None = None) -> Response:
    """The consent in three steps: what this is, confirm each point, review. One form, sent once; after an
    error as it was filled in."""
    name = patient_id and portal.patient_name(user["username"], patient_id)
    whose = f"the health record of {name}" if name else "what you may see here"
    writing = writing_in_words(details["scope"])
    aim, review = f"see {whose}", f"will see, of {whose}, what you leave checked"
    if writing and not letters_of(details["scope"]).isdisjoint("rs"):
        aim += f", and to {writing} records there"
        review += f", and may {writing} records of these kinds"
    elif writing:
        aim, review = f"{writing} records in {whose}", f"may {writing} there, of the kinds left checked"
    asked = f"{client.name} asks to {aim}. You decide whether it may, what of it, and until when."
    points = (f"I want {client.name} to {aim}.",
              "What the app does with the data afterwards is up to the app, not to this portal.",
              "I can stop sharing at any time, on the page \"Apps you share with\".")

    def step(number: int, title: str, *content: Any) -> Markup:
        heading = tag("h2", title, " ", tag("small", f"Step {number} of 3"), tabindex=-1)
        return tag("section", heading, *content, class_="card")
    boxes = [check_box(point, class_="glyphbox", rel="confirm", required=True, checked=bool(error))
             for point in points]
    steps = [
        step(1, "What this is", tag("p", asked), app_facts(client, details),
             scope_list(portal, client, details["scope"]), CONTINUE, REFUSE),
        step(2, "Confirm each point", boxes, CONTINUE, BACK),
        step(3, "Review", tag("p", f"{client.name} {review}:"),
             what_to_share(portal, client, details, patient_id, request.form() if error else [],
                           what_is_wrong(error, "security_labels", "approval_expires")),
             tag("button", "Approve", id="authorize", name="decision", value="approve"), REFUSE, BACK)]
    # Enter in a field presses a form's first button, which would refuse. This one decides nothing.
    stay = tag("button", "Stay", data_slide="stay", hidden=True)
    form = post_form(portal, request, "/oauth/consent", stay, steps, id="consent-carousel",
                     hidden=[("request", request_id), ("patient_id", patient_id or "")])
    return page(portal, request, f"Share data with {client.name}?", form, script=CONSENT_SCRIPT,
                status=error.status if error else 200, user=user, back=f"/oauth/consent?request={request_id}")


def app_facts(client: Client, details: Json) -> Markup:
    """Who asks, and where the answer goes."""
    (scheme, host, *_), known = urlsplit(details["redirect_uri"]), client.metadata
    goes_to = f"{scheme}://{host}" if host else f"the app that opens {scheme}: links"
    pages = {"client_uri": "its own page", "policy_uri": "what it does with data", "tos_uri": "its terms"}
    links = [tag("p", tag("a", label, href=known[name])) for name, label in pages.items() if name in known]
    known_as = [tag("code", client.client_id), client.registered_itself and ", registered itself"]
    told = facts(("Known here as", known_as), ("What it says", links), ("Goes to", goes_to))
    return tag("div", told, client.registered_itself and tag(
        "p", "The app's maker chose its name. This portal has not checked who that is: anybody may register "
        "an app. Approve only if you have just come from that app.", class_="quiet"))


VERBS = {"r": "open", "s": "search", "c": "add", "u": "change"}


def writing_in_words(scope: str) -> str:
    """What a scope lets its bearer do to records beside reading: "add", "change", both, or ""."""
    return " and ".join(VERBS[letter] for letter in "cu" if letter in letters_of(scope))


def letters_of(scope: str) -> set[str]:
    """The letters of a scope's resource scopes, all together."""
    return set[str]().union(*(parsed.letters for parsed in resource_scopes(scope)))


def scope_list(portal: Portal, client: Client, scope: str) -> list[Markup]:
    """What a scope lets the app do, in words."""
    limit = "It can change nothing"
    if writing_in_words(scope):
        limit = "What it writes stays there when you stop sharing. It can delete nothing"
    content = [tag("ul", [scope_line(portal, client, word) for word in scope.split()]),
               tag("p", f"{limit}, and it never learns your password.")]
    return [tag("h3", "If you approve, it can"), tag("div", content)]


def scope_line(portal: Portal, client: Client, word: str) -> Markup:
    """One scope in words: what it allows, of which kinds, or only where. What reaches far stands out: all
    kinds of data, all records, writing, access while nobody is there (SMART, "Best Practices")."""
    parsed, details = parse_scope(word), []  # type: ResourceScope | None, list[Any]
    told, far = PLAIN_SCOPES.get(word, word), word == "offline_access"
    if parsed:
        verbs = " and ".join(verb for letter, verb in VERBS.items() if letter in parsed.letters)
        all_types = "everything, of every kind there is now and may be later,"
        what = all_types if parsed.type == "*" else f"{parsed.type} records"
        whose = "the record" if parsed.context == "patient" else "every record you may open"
        told = f"{verbs} {what} in {whose}"
        far = parsed.type == "*" or parsed.context == "user" or bool(writing_in_words(word))
        if parsed.constraints:
            details = [", but only", where(parsed.constraints)]
        elif parsed.type != "*":
            labels = [label for label in offered_categories(portal, client, word) if label != "other"]
            details = [labels and ": ", ", ".join(CATEGORIES[label][0].lower() for label in labels)]
    return tag("li", told, details, " ", tag("small", tag("code", word)), class_="note" if far else None)


def where(constraints: Sequence[tuple[str, str]]) -> str:
    """A scope's ?name=value in words. The app wrote the values: quoted, they can't read as the portal's."""
    told = [f"{name} is " + " or ".join(tag("code", json.dumps(value, ensure_ascii=False))
                                        for value in _COMMA.split(values)) for name, values in constraints]
    return Markup(" where " + " and ".join(told)) if told else ""


def category_in_words(label: str, scopes: Sequence[ResourceScope]) -> Markup:
    """A category's name, with what these scopes reach of it where that is not all."""
    name, types = CATEGORIES[label]
    limits = {scope: where([pair for pair in scope.constraints  # ?category= is none within the category
                            if pair[0] != "category" or scope.type not in _BY_CONTENT]) for scope in scopes}
    wholly = {scope.type for scope, limit in limits.items() if not limit}
    if "*" in wholly or wholly.issuperset(types):
        return Markup(name)
    told: dict[str, None] = {}
    for scope, limit in limits.items():
        records = re.sub(r"\B(?=[A-Z])|\*", " ", scope.type).strip().lower()
        kinds = " of other kinds" if label == "other" and scope.type in _BY_CONTENT else ""
        if not limit or scope.type not in wholly:
            told[f"{records} records{kinds}{limit}".strip()] = None
    return Markup(f"{name} (only {', '.join(told)})")


def what_to_share(portal: Portal, client: Client, details: Json, patient_id: str | None,
                  sent: list[tuple[str, str]], wrong: dict[str, str]) -> list[Any]:
    """What the user chooses: categories, all checked at first; a visit if the app asks and no launch named
    it; the last day. Of a form that was `sent`, what was chosen there."""
    now, scope, visits, filled = portal.clock.now(), details["scope"], {}, dict(sent)
    reached, boxes = scopes_by_category(scope), []
    for label in offered_categories(portal, client, scope):
        name = category_in_words(label, reached[label])
        words = "" if "(" in name else CATEGORY_WORDS[label]  # which tell of the whole category
        boxes.append(check_box(name, tag("small", words), name="security_labels", value=label,
                               checked=not sent or ("security_labels", label) in sent))
    named = "encounter" in details["launch"].get("context", {})
    if patient_id and "launch/encounter" in scope.split() and not named:
        visits = encounters_of(portal, patient_id)
    return [tag("fieldset", tag("legend", "What it sees"), alert(wrong["security_labels"]), boxes),
            selection("Which visit", "encounter_id", visits.items(), filled.get("encounter_id", ""))
            if visits else None,
            field("Until the end of", "approval_expires", filled.get("approval_expires", day_of(now, 1)),
                  wrong["approval_expires"], "date", required=True, min=day_of(now), max=day_of(now, 2)),
            tag("p", "You can stop sharing before that day, at any time, under ", link(portal, "/apps"),
                ". What the app has fetched by then, it keeps.")]


@route("GET /apps", "S4S", kind="page")
def apps(portal: Portal, request: Request) -> Response:
    """What the user shares, with whom, until when, and a button to stop it."""
    user = session_user(portal, request)
    if not user:
        return to_sign_in(portal, request, "/apps")
    shares: dict[tuple[str, str | None], list[Row]] = {}  # client and patient: their grants, the newest first
    live = "SELECT * FROM grants WHERE username = ? AND NOT ended AND approval_expires > ?"
    for grant in portal.state.rows(f"{live} ORDER BY approved DESC", user["username"], portal.clock.now()):
        shares.setdefault((grant["client_id"], grant["patient_id"]), []).append(grant)
    stop = Fields(request.pairs()).get("stop")
    question = [stop_card(portal, request, last) for last, *_ in shares.values() if last["grant_id"] == stop]
    rows = [share_row(portal, request, grants, stop) for grants in shares.values()]
    shown = html_table(("App", *SHARE_HEADS, ""), rows) if rows else tag(
        "p", "You share with no app. When an app asks and you approve, it is listed here, with a button to "
        "stop it.")
    return page(portal, request, "Apps you share with", question, tag("div", shown, class_="card"), user=user)


SHARE_HEADS = ("Whose record", "What", "Since and until")


def share_row(portal: Portal, request: Request, grants: list[Row], stop: str) -> Markup:
    """What a user shares with one app of one patient, with a button that asks for `stop_card`, which makes
    it the row in question."""
    newest, (app, whose) = grants[0], app_and_record(portal, grants[0])
    scopes = dict.fromkeys(scope for grant in grants for scope in grant["scope"].split())
    writing = writing_in_words(" ".join(scopes))
    what = [categories_in_words(grants), writing and tag("div", f"It may {writing} records of these kinds."),
            tag("details", tag("summary", "Scope"), tag("code", " ".join(scopes)))]
    until = max(grant["approval_expires"] for grant in grants)
    days = [tag("time", day_of(newest["approved"])), " until ", tag("time", day_of(until))]
    cells = [tag("td", value, data_label=head) for head, value in zip(SHARE_HEADS, (whose, what, days))]
    button = tag("button", "Stop sharing", tag("small", f" with {app}: {whose}"), class_="btn-default",
                 name="stop", value=newest["grant_id"])
    form = tag("form", button, action=f"{portal.browser_base(request)}/apps")
    return tag("tr", tag("td", tag("strong", app)), cells, tag("td", form), rel=newest["client_id"],
               aria_current="true" if newest["grant_id"] == stop else None)


def app_and_record(portal: Portal, grant: Row) -> tuple[str, str]:
    """The names of a grant's app and patient."""
    client, patient_id, name = portal.client(grant["client_id"]), grant["patient_id"], None
    with contextlib.suppress(FhirError):  # a FHIR server behind that is down keeps nobody from stopping it
        name = portal.patient_name(grant["username"], patient_id) if patient_id else "nobody's in particular"
    return client.name if client else grant["client_id"], name or patient_id


def categories_in_words(grants: list[Row]) -> Markup:
    """What several grants share by category; a grant without any is not limited by category."""
    shared: dict[str, list[ResourceScope]] = {}
    for grant in grants:
        labels = json.loads(grant["security_labels"])
        if not labels:
            return Markup("everything its scope allows")
        for label, scopes in scopes_by_category(grant["scope"]).items():
            shared.setdefault(label, []).extend(scopes if label in labels else [])
    seen = [category_in_words(label, shared[label]) for label in CATEGORIES if shared.get(label)]
    left_out = [name for label, (name, _) in CATEGORIES.items() if not shared.get(label)]
    if len(left_out) > 3 or any("(" in words for words in seen):
        return Markup("; ".join(seen))
    return Markup(f"everything but {'; '.join(left_out)}" if left_out else "everything")


def stop_card(portal: Portal, request: Request, grant: Row) -> Markup:
    """The question before sharing stops."""
    app, whose = app_and_record(portal, grant)
    return card(
        f"Stop sharing with {app}?",
        tag("p", f"From now on it can fetch nothing more of this record: {whose}. What it has fetched, it "
            "keeps. To share again, start in the app."),
        post_form(portal, request, f"/revoke/{grant['grant_id']}",
                  tag("button", "Stop sharing", autofocus=True)),
        tag("p", tag("a", "Keep sharing", href=f"{portal.browser_base(request)}/apps")), class_="modal in")


@route("GET,POST /launch", "SMART App Launch, EHR launch", kind="page")
def launch_page(portal: Portal, request: Request) -> Response:
    """Be the EHR: choose app, user, patient and visit, and launch. A test control, so open to anyone, or not
    there."""
    off = "Launching is a debug control, and those are off; --debug turns them on."
    need(portal.settings.serves_debug, off, "not_found", 404, PageError)
    if request.method != "POST":
        return launch_form(portal, request, Fields(request.pairs()), None)
    fields = guarded_form(portal, request)
    given: Json = {name: fields.get(name) for name in LAUNCH_FIELDS if fields.get(name)}
    given["need_patient_banner"] = bool(fields.get("need_patient_banner"))
    try:
        return redirect(create_launch(portal, portal.browser_base(request), **given)["launch_url"])
    except PortalError as error:
        return launch_form(portal, request, fields, error)


LAUNCH_FIELDS = ("client_id", "launch_uri", "username", "patient_id", "encounter_id", "intent")


def launch_form(portal: Portal, request: Request, fields: Fields, error: PortalError | None) -> Response:
    """What to launch, with what was chosen so far, and the patients whose names have the text looked for."""
    wrong, text, sent = what_is_wrong(error, *LAUNCH_FIELDS), fields.get("name"), fields.get("form_token")
    chosen = {name: fields.get(name) for name in LAUNCH_FIELDS}
    if not (sent or chosen["client_id"] or chosen["launch_uri"]):
        chosen["client_id"] = "demo-app"
    clients = [portal.client(row["client_id"]) for row in portal.state.rows("SELECT client_id FROM clients")]
    launchable = [(client.client_id, client.name) for client in clients
                  if client and client.may_use("authorization_code")]
    users = [(user["username"], user["name"]) for user in some_users(portal, 200)]
    patients, patient_id = portal.patients_of("clinician", text), chosen["patient_id"]
    if patient_id and patient_id not in patients:
        patients[patient_id] = portal.patient_name("clinician", patient_id) or patient_id
    visits = encounters_of(portal, patient_id) if FHIR_ID.fullmatch(patient_id) else {}
    session_id = browser_session(portal, request) or new_session_id()

    def choose(label: str, name: str, nothing: str, choices: Iterable[tuple[str, str]]) -> Markup:
        return selection(label, name, [("", nothing), *choices], chosen[name], wrong[name])
    form = post_form(
        portal, request, "/launch", choose("App", "client_id", "the one at the address below", launchable),
        field("Its launch address (if none is registered, or another one)", "launch_uri",
              chosen["launch_uri"], wrong["launch_uri"]),
        choose("Who uses it", "username", "whoever signs in", users),
        field("Find patients by name", "name", text),
        choose("Whose record is open", "patient_id", "none yet", patients.items()),
        tag("button", "Show patients and visits", class_="btn-default", formmethod="get"),
        choose("Which visit", "encounter_id", "none", visits.items()),
        field("Intent (a word that you and the app agreed on)", "intent", chosen["intent"], wrong["intent"]),
        check_box("The app must show whose record is open (need_patient_banner)", name="need_patient_banner",
                  value="1", checked=not sent or bool(fields.get("need_patient_banner"))),
        tag("button", "Launch", id="launch"), session_id=session_id, class_="card")
    told = tag("p", "As an electronic health record does: the app opens, is told whose record is open here, "
               "and asks for permission as always. A launch works once, within five minutes.")
    return page(portal, request, "Launch an app", told, form, status=error.status if error else 200,
                session_id=session_id)


@route("GET /", "S4S", kind="page")
def start_page(portal: Portal, request: Request) -> Response:
    """What this is, who can sign in, what can be tried."""
    base, settings, user = portal.base(request), portal.settings, session_user(portal, request)
    version = "that of the FHIR server behind" if settings.fhir_server else settings.fhir_version.upper()
    # Of secrets the demo's alone are shown, which stand in the source.
    told = {name: [", its secret ", tag("code", secret)] for name, secret, _ in DEMO_CLIENTS
            if portal.seeds.clients[name].secret_hash == hash_secret(secret)}
    clients = [tag("li", tag("code", name), told.get(name)) for name in portal.seeds.clients]
    return page(
        portal, request, "A patient portal to test apps with",
        tag("p", "An app that speaks SMART on FHIR asks here for one patient's record; if the patient "
            "approves, it sees that record and nothing else. This is the OAuth 2.0 server and the FHIR API "
            "behind it, in one file of Python that is meant to be read."),
        tag("p", tag("strong", "For testing only. "),
            "All patients are made up. Open to anyone who can reach this server: ",
            settings.serves_open_fhir and "every record, at /api/open-fhir/; ",
            settings.serves_debug and "tokens for any account, at /oauth/debug/; ",
            "the passwords and secrets below.", class_="error"),
        user and card(f"Welcome, {user['name']}", tag(
            "p", f"You may open {records_in_words(portal, user)}, and see what you share under ",
            link(portal, "/apps"), ".")),
        card("What to try", facts(
            (link(portal, "/demo", "Demo app"),
             "A whole SMART app in one page: watch every request and answer, then the record."),
            (link(portal, "/launch", "Launch an app"), settings.serves_debug and
             "Play the electronic health record: choose patient and app, and launch it."),
            (link(portal, "/login", "Sign in"), "As one of those below, to see which apps you share with."),
            (link(portal, "/api/open-fhir/Patient?_pretty=true", "All patients"),
             settings.serves_open_fhir and "As FHIR has them, without a token."),
            ("In a shell", tag("button", "Copy", id="copy", hidden=True, class_="plain"))),
            tag("pre", first_steps(portal, base), tabindex=0)),
        accounts(portal), card("For your app", facts(
            ("FHIR base", tag("code", f"{base}/api/fhir")), ("FHIR version", version),
            ("Clients", tag("ul", clients)),
            ("Discovery", link(portal, "/api/fhir/.well-known/smart-configuration", "every address")),
            ("More", "README.md in its repository; then the program itself, from its first line."))),
        endpoint_list(portal), user=user, script=COPY_SCRIPT)


COPY_SCRIPT = """
const copy = document.getElementById('copy');
copy.hidden = !navigator.clipboard;  // which browsers give to https and localhost alone
copy.onclick = () => navigator.clipboard.writeText(document.querySelector('pre').textContent).then(
  () => { copy.textContent = 'Copied'; });
"""


def first_steps(portal: Portal, base: str) -> str:
    """Commands for a shell: a token, and a record read with it; discovery where nobody may ask for tokens."""
    if not portal.settings.serves_debug:
        return f"curl -s {base}/api/fhir/.well-known/smart-configuration"
    row = portal.state.row("SELECT username, patient_id FROM patients "
                           "ORDER BY username <> 'daniel-adams', is_user DESC LIMIT 1")
    username, patient_id = row or ("PATIENT_ID", "PATIENT_ID")  # a patient who was loaded signs in by id
    body = f'{{"client_id": "test-suite", "username": "{username}", "patient_id": "{patient_id}"}}'
    return (f"token=$(curl -s {base}/oauth/debug/token -H 'Content-Type: application/json' \\\n"
            f"  -d '{body}' |\n" r"""  sed 's/.*"access_token": *"\([^"]*\)".*/\1/')""" "\n"
            f'curl -s "{base}/api/fhir/Patient/{patient_id}?_pretty=true" -H "Authorization: Bearer $token"')


def endpoint_list(portal: Portal) -> Markup:
    """Every endpoint with the text it implements, from the routes themselves; closed until asked for."""
    served = {"/oauth/debug/": portal.settings.serves_debug, "/launch": portal.settings.serves_debug,
              "/api/open-fhir/": portal.settings.serves_open_fhir}
    rows, closed = [], tuple(prefix for prefix, is_open in served.items() if not is_open)
    for route in ROUTES:
        if not route.path.startswith(closed):
            path, methods = route.path.replace("{}", "..."), ", ".join(route.methods)
            cells = [tag("code", path), " ", tag("small", methods)], what_it_does(route), cited(route.spec)
            rows.append(tag("tr", [tag("td", cell) for cell in cells]))
    return tag("details", tag("summary", f"All {len(rows)} endpoints"),
               html_table(("Path and methods", "What it does", "Text"), rows), class_="card")


# ######################################################################## 24 demo app

# A SMART app such as others write: a public client that this server treats like any other. Its script is the
# example to copy: discovery, PKCE, authorization, token, reading, refreshing, revoking, in that order.
DEMO_STYLE = STYLE + """
.story{list-style:none;padding:0}.story>li{margin:0 0 .6rem}summary{padding:.35rem 0}.story h3{
margin:.6rem 0 0;font-size:.95rem}.story pre{max-height:calc(.8rem + 18em)}#actions{margin:0 0 1.25rem}figure{
margin:0;position:relative;width:15rem}figure ul{display:none;position:absolute;z-index:1;right:0;margin:0;
padding:.5rem .8rem;list-style:none;background:var(--paper);border:1px solid var(--edge);border-radius:.4rem}
figure:is(:hover,:focus) ul{display:block}td small{display:block}svg{display:block}svg text{
font:10px system-ui,sans-serif;fill:var(--quiet)}.grid{stroke:var(--line)}.range{fill:var(--edge);opacity:.35}
polyline{fill:none;stroke:var(--accent);stroke-width:1.5}circle{fill:var(--accent);stroke:var(--accent)}
.second polyline{stroke-dasharray:4 3}.second circle{fill:var(--paper)}.off{color:var(--warn);
fill:var(--warn);stroke:var(--warn);font-weight:600}[hidden]{display:none!important}#patient :is(th,td){
min-width:0;overflow-wrap:normal}@media(max-width:48rem){#patient td::before{display:none}#patient td{
display:inline-block;padding-right:1rem}#patient td:first-child{display:block}figure ul{right:auto;left:0}
.story summary{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}}@media(min-width:70rem){body>*{
padding-inline:max(1rem,50% - 38rem)}main>*{grid-column:1;min-width:0}main{display:grid;
grid-template-columns:3fr 2fr;gap:0 2rem}#told{grid-area:2/2}}
"""
DEMO_SCRIPT = r"""
'use strict';

// ---- Showing things. Text from a server becomes text of the page, never markup: innerHTML would run it.
const $ = id => document.getElementById(id);
const SVG = ['svg', 'g', 'rect', 'path', 'polyline', 'circle', 'text', 'title'];

function make(name, attributes, ...children) {
  const language = SVG.includes(name) ? '2000/svg' : '1999/xhtml';
  const made = document.createElementNS('http://www.w3.org/' + language, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.flat(3));
  return made;
}

const pretty = value => typeof value === 'string' ? value : JSON.stringify(value, null, 2);
const definitions = pairs => make('dl', {}, pairs.map(
  ([name, value]) => value ? [make('dt', {}, name), make('dd', {}, value)] : []));
const roomy = window.matchMedia('(min-width: 48rem)').matches;  // else a step is one line, until it is opened
let story = [];  // what happened so far: title, section of the text, parts to look at, shown open or closed

function tell(title, section, parts, open = true) {
  story.push([title, section, parts, open]);
  $('story').append(make('li', {}, make('details', open && roomy ? {open} : {},
    make('summary', {}, title + ' ', make('small', {}, section)),
    parts.map(([heading, value]) => [
      make('h3', {}, heading), make('pre', {tabindex: 0, 'aria-label': heading}, pretty(value))]))));
  $('told').hidden = false;
}

const fail = message => { throw new Error(message); };
const run = work => work.then(told => told && $('status').replaceChildren(told), error =>
  $('status').replaceChildren(make('p', {class: 'error', role: 'alert'}, error.message, ' ', again())));
const again = () => make('a', {href: home}, 'Start again');

// One request, shown with its answer.
async function call(title, section, url, {method = 'GET', headers = {}, form} = {}, open = true) {
  const sentForm = form && new URLSearchParams(form);
  const answer = await fetch(url, {method, headers, body: sentForm, cache: 'no-store'});
  let body = await answer.text();
  try { body = JSON.parse(body); } catch { /* not JSON: shown as it is */ }
  const sent = Object.entries(headers).map(header => header.join(': ')).join('\n') || 'no headers of our own';
  tell(title, section, [[`${method} ${url}`, sent], ...(form ? [['Form sent', form]] : []),
                        [`Answer: ${answer.status} ${answer.statusText}`, body]], open);
  return {ok: answer.ok, status: answer.status, body};
}

// ---- 1 to 3: find the server, make a secret, ask.
const base = $('app').dataset.base;  // the server's name for itself
const home = base + '/demo';  // this page is where the browser comes back to, too
const query = new URLSearchParams(location.search);

const base64url = bytes => btoa(String.fromCharCode(...new Uint8Array(bytes)))
  .replaceAll('+', '-').replaceAll('/', '_').replaceAll('=', '');
const random = () => base64url(crypto.getRandomValues(new Uint8Array(32)));

async function prepare() {
  // An EHR's launch says which server to ask. An app asks servers it trusts: a stranger's would read along.
  const iss = query.get('iss') || base + '/api/fhir', launch = query.get('launch');
  if (iss !== base + '/api/fhir') fail(`iss is ${iss}: this app trusts ${base}/api/fhir alone.`);
  if (launch) tell('The EHR launched this app', 'SMART App Launch', [['In the address', {iss, launch}]]);
  const found = await call('1. Discover the endpoints', 'SMART App Launch, Conformance; RFC 8414',
                           iss + '/.well-known/smart-configuration');
  if (!found.ok) fail('There is no discovery document.');
  if (!crypto.subtle) fail('PKCE needs SHA-256, and this browser gives it to https and localhost alone.');
  const verifier = random(), state = random(), nonce = random();
  const challenge = base64url(await crypto.subtle.digest('SHA-256', new TextEncoder().encode(verifier)));
  tell('2. Make secrets', 'RFC 7636 sections 4.1 and 4.2; RFC 6749 section 10.12', [
    ['code_verifier: random, stays here', verifier], ['code_challenge: its SHA-256, goes along', challenge],
    ['state: comes back, so that we know we asked', state], ['nonce: comes back in the id_token', nonce]]);
  $('scope').value = `openid fhirUser ${launch ? 'launch' : 'launch/patient'} patient/*.rs offline_access`;
  $('ask').hidden = false;
  $('ask').onsubmit = event => {
    event.preventDefault();
    const asked = {
      response_type: 'code', client_id: 'demo-app', redirect_uri: home, scope: $('scope').value, state,
      aud: iss, nonce, code_challenge: challenge, code_challenge_method: 'S256', ...(launch && {launch})};
    tell('3. Send the browser to ask for permission', 'RFC 6749 section 4.1.1; SMART App Launch',
         [[found.body.authorization_endpoint, asked]]);
    // This page goes away. What it must know later waits in this tab's storage: no other site looks there.
    const kept = {config: found.body, iss, verifier, state, nonce, asked, story};
    sessionStorage.setItem('demo', JSON.stringify(kept));
    location.assign(found.body.authorization_endpoint + '?' + new URLSearchParams(asked));
  };
}

// ---- 4 and 5: the browser comes back with a code; trade it for tokens.
let kept, token, expires;  // what we kept before leaving; the token response; when the access token ends
const claims = jwt => JSON.parse(new TextDecoder().decode(Uint8Array.from(
  atob(jwt.split('.')[1].replaceAll('-', '+').replaceAll('_', '/')), letter => letter.charCodeAt(0))));

async function comeBack() {
  kept = JSON.parse(sessionStorage.getItem('demo'));
  sessionStorage.removeItem('demo');  // once: a reload must not use the code again
  history.replaceState(null, '', home);  // and nobody shall find it in the address
  if (!kept) fail('An answer came, but this tab asked nothing.');
  for (const told of kept.story) tell(...told);
  tell('4. The browser comes back', 'RFC 6749 section 4.1.2; RFC 9207 where the server is strict',
       [['In the address', Object.fromEntries(query)]]);
  if (query.get('state') !== kept.state) fail('state is not the one we sent: someone else made this answer.');
  if (kept.config.authorization_response_iss_parameter_supported && query.get('iss') !== kept.config.issuer)
    fail('iss is not the server we asked (RFC 9207).');
  if (query.has('error')) fail(`No permission: ${query.get('error')}, ${query.get('error_description')}.`);
  await obtain('5. Trade the code for tokens', 'RFC 6749 section 4.1.3; RFC 7636 section 4.5', {
    grant_type: 'authorization_code', code: query.get('code'), redirect_uri: home, client_id: 'demo-app',
    code_verifier: kept.verifier});
  if (token.id_token) {
    const told = claims(token.id_token), now = Date.now() / 1000;
    tell('Who signed in', 'OpenID Connect Core sections 2 and 3.1.3.7', [['Claims of the id_token', told]]);
    // Straight from the token endpoint, TLS vouches for it; one from elsewhere needs its signature checked.
    if (told.nonce !== kept.nonce || told.iss !== kept.config.issuer || told.aud !== 'demo-app' ||
        told.exp < now - 60) fail('The id_token is not for this sign-in.');
  }
  return readRecord();
}

const post = (title, section, url, form) => call(title, section, url, {method: 'POST', form, headers: {
  'Content-Type': 'application/x-www-form-urlencoded', Accept: 'application/json'}});

async function obtain(title, section, form) {
  const answer = await post(title, section, kept.config.token_endpoint, form);
  if (!answer.ok) fail(`The token endpoint refused: ${answer.body.error}, ${answer.body.error_description}.`);
  token = {...token, ...answer.body};  // a refresh may leave out what stays as it is
  expires = Date.now() + token.expires_in * 1000;
  showGranted();
}

function showGranted(ended = 'none: ask again') {
  const id = token.id_token && claims(token.id_token);
  $('granted').replaceChildren(make('h2', {}, 'What we were granted'), definitions([
    ['Scope asked', kept.asked.scope], ['Scope granted', token.scope],
    ['Patient (context)', token.patient || 'none'],
    ...['encounter', 'intent', 'need_patient_banner', 'fhirContext'].map(name => [name, pretty(token[name])]),
    ['User (id_token)', id && `${id.sub}, ${id.fhirUser || 'no fhirUser'}`],
    ['Access token', make('span', {id: 'countdown', role: 'timer'})],
    ['Refresh token', token.refresh_token ? 'yes: we may come back (offline_access)' : ended]]));
  $('refresh').hidden = $('revoke').hidden = !token.refresh_token;
  $('granted').hidden = $('actions').hidden = false;
  countDown();
}

function countDown() {
  const left = Math.max(0, Math.round((expires - Date.now()) / 1000));
  const clock = `${Math.floor(left / 60)}:${String(left % 60).padStart(2, '0')}`;
  const state = left ? `ends in ${clock}` : 'has expired: refresh it';
  $('countdown').textContent = token.access_token ? state : 'revoked';
}

// ---- 6: read. Every request carries the access token in a header, never in an address.
const get = (title, url, open = false) => call(title, 'FHIR; RFC 6750 section 2.1', url, {
  headers: {Authorization: 'Bearer ' + token.access_token,
            Accept: 'application/fhir+json, application/json+fhir'}}, open);
const getPatient = (title, open) => get(title, `${kept.iss}/Patient/${token.patient}`, open);

async function search(type, parameter) {
  const resources = [];
  let url = `${kept.iss}/${type}?${parameter}=${token.patient}&_count=200`;
  for (let page = 1; url && page <= 20; page++) {  // a search comes in pages; the link "next" leads on
    const {ok, body} = await get(`Search ${type}` + (page > 1 ? `, page ${page}` : ''), url);
    if (!ok) return {refused: true, resources};
    for (const {resource} of body.entry || []) if (resource.resourceType === type) resources.push(resource);
    url = body.link?.find(link => link.relation === 'next')?.url;
  }
  return {resources};
}

async function readRecord() {
  if (!token.patient) fail('No patient in context, so there is no record to read.');
  const metadata = await get('6. What the FHIR server can do', kept.iss + '/metadata');
  const patient = await getPatient('Read the patient');
  const record = {Patient: {refused: !patient.ok, resources: patient.ok ? [patient.body] : []}};
  for (const {type, searchParam = []} of metadata.body.rest[0].resource) {
    const names = searchParam.map(parameter => parameter.name);
    const parameter = ['patient', 'subject', 'beneficiary'].find(name => names.includes(name));
    if (!parameter || type === 'Patient') continue;
    $('status').textContent = `Reading ${type} ...`;
    record[type] = await search(type, parameter);
  }
  show(record);
  return make('p', {}, 'Done. All that was sent: ', make('a', {href: '#told'}, 'What was said'));
}

// ---- 7 and 8: come back with the refresh token; end it all.
$('refresh').onclick = () => run(obtain('7. Refresh: it buys new tokens, once', 'RFC 6749 section 6', {
  grant_type: 'refresh_token', refresh_token: token.refresh_token, client_id: 'demo-app'})
  .then(() => 'Refreshed: both tokens are new.'));
$('reread').onclick = () => run(getPatient('Read the patient again', true).then(
  answer => `The patient was asked for again: ${answer.status}.`));
$('revoke').onclick = () => run(revoke());

async function revoke() {
  await post('8. Revoke: ending the refresh token ends the authorization', 'RFC 7009 section 2.1',
    kept.config.revocation_endpoint, {token: token.refresh_token, client_id: 'demo-app'});
  await getPatient('What the old access token is worth now', true);
  token.access_token = token.refresh_token = '';
  showGranted('revoked');
  $('actions').hidden = true;  // and with it the button that had the focus
  $('status').focus();
  return make('p', {}, 'Revoked: this app can read nothing more. ', again());
}

// ---- The patient. FHIR's versions differ in names: each helper takes what any of them has.
const array = value => [].concat(value || []);  // DSTU2 has one where R4 has several
const words = concept => concept && (concept.text || array(concept.coding).map(
  coding => coding.display || coding.code).find(Boolean) || concept.display || concept.reference) || '';
const day = text => (text || '').slice(0, 10), time = text => make('time', {}, day(text));
const isKind = kind => observation => array(observation.category).some(
  concept => array(concept.coding).some(coding => coding.code === kind));
const card = (title, ...content) => make('section', {class: 'card'}, make('h2', {}, title), content);
const quiet = text => make('p', {class: 'quiet'}, text);
const list = (title, lines, ...more) => card(title, make('ul', {}, lines.map(line => make('li', {}, line))),
                                             lines.length ? more : quiet('Nothing came.'));

function show(record) {
  const all = (...types) => types.flatMap(type => record[type]?.resources || []);
  const observations = all('Observation'), orders = all('MedicationRequest', 'MedicationOrder');
  const granted = token.scope.split(' '), [patient] = all('Patient'), name = array(patient?.name)[0] || {};
  const called = name.text || [...array(name.given), ...array(name.family)].join(' ') || 'A patient, unnamed';
  const kinds = ['vital-signs', 'laboratory', 'social-history'], types = Object.keys(record);
  const without = (told, all, present) => told + (all.filter(kind => !present(kind)).join(', ') || 'none');
  $('patient').replaceChildren(
    // need_patient_banner is false where the EHR shows already whose record it is.
    ...(token.need_patient_banner === false ? [] : [card(called, definitions([
      ['Born', patient?.birthDate], ['Gender', patient?.gender], ['Id', token.patient]]))]),
    card('Vital signs', measurements(observations.filter(isKind('vital-signs')))),
    card('Laboratory', measurements(observations.filter(isKind('laboratory')))),
    list('Problems', all('Condition').map(problem => [words(problem.code), ' ', time(
      problem.onsetDateTime || problem.recordedDate || problem.assertedDate || problem.dateRecorded)])),
    list('Medicines', (orders.length ? orders : all('MedicationStatement')).map(order => [
      words(order.medicationCodeableConcept || order.medicationReference),
      ...array(order.dosageInstruction || order.dosage).map(dose => dose.text || '')].join(', '))),
    list('Allergies', all('AllergyIntolerance').map(allergy => [words(allergy.code || allergy.substance),
      ...array(allergy.reaction).flatMap(reaction => array(reaction.manifestation).map(words))].join(': '))),
    list('What did not come', [
      without('Scopes asked for, not granted: ', kept.asked.scope.split(' '), word => granted.includes(word)),
      without('Types whose search was refused: ', types, type => !record[type].refused),
      without('Kinds of Observation without one: ', kinds, kind => observations.some(isKind(kind))),
      without('Other types without a resource: ', types, type => record[type].refused || all(type).length)],
      quiet('Such a resource is not in the record, or not shared: an app cannot tell which.')));
  $('patient').hidden = false;
}

// ---- Numbers over time.
const outside = ({value, low, high}) => (value > high && 'high') || (value < low && 'low') || '';
const reference = ({low, high}) => [['range from', low], ['to', high]].filter(
  ([, bound]) => bound !== undefined).flat().join(' ') || 'no range';
const joined = (parts, told) => [...new Set(parts.map(told))].filter(Boolean).join(' / ');
const said = ({parts}) => parts.map(part => part.value).join(' / ') + ' ' + joined(parts, part => part.unit);

// A row for each thing measured, in each unit: what came last, and how all came to be over time.
function measurements(observations) {
  const measured = {};
  for (const {code, component, ...seen} of observations) {
    const when = seen.effectiveDateTime || seen.effectivePeriod?.start || seen.issued || '';
    const parts = (component || [{code, ...seen}]).map(part => {  // a blood pressure has two components
      const {low, high} = part.referenceRange?.[0] ?? {};
      const text = words(part.valueCodeableConcept) || part.valueString;
      const {value = text, unit = ''} = part.valueQuantity ?? {};
      return {name: words(part.code), value, unit, low: low?.value, high: high?.value};
    }).filter(({value}) => value !== undefined);
    const key = words(code) + parts.map(({name, unit}) => name + unit);
    if (parts.length) (measured[key] ??= []).push({code, when, time: Date.parse(when) || 0, parts});
  }
  const rows = Object.values(measured).map(points => {
    points.sort((earlier, later) => earlier.time - later.time);
    const latest = points.at(-1), name = words(latest.code), off = joined(latest.parts, outside);
    const formal = array(latest.code.coding).map(coding => coding.display).find(Boolean) || name;
    return [[name, formal === name ? '' : make('small', {}, formal)],  // "Creat SerPl-mCnc", LOINC's
            make('span', {class: off && 'off'}, `${said(latest)} ${off}`), joined(latest.parts, reference),
            time(latest.when), chart(name, points)];
  });
  if (!rows.length) return quiet('Nothing came.');
  return make('table', {}, make('thead', {}, make('tr', {},
    ['Test', 'Latest', 'Reference', 'Date', 'Over time'].map(head => make('th', {scope: 'col'}, head)))),
    make('tbody', {}, rows.map(row => make('tr', {}, row.map(cell => make('td', {}, cell))))));
}

// Round numbers, three to five, between which all these lie.
function ticks(numbers) {
  const least = Math.min(...numbers), most = Math.max(...numbers), third = (most - least || 1) / 3;
  const power = 10 ** Math.floor(Math.log10(third));
  const step = power * [1, 2, 5, 10].find(times => times * power >= third);
  const from = Math.floor(least / step), to = Math.max(Math.ceil(most / step), from + 2);
  return Array.from({length: to - from + 1}, (_, at) => Number(((from + at) * step).toPrecision(9)));
}

// Values over time, a line for each component; the band behind a single line is its reference range. With the
// pointer or the focus on it, it lists them.
function chart(name, points) {
  const lines = points[0].parts, {low, high} = lines.length > 1 ? {} : points.at(-1).parts[0];
  const numbers = [...points.flatMap(({parts}) => parts.map(({value}) => value)), low, high].filter(
    number => number !== undefined);
  if (points.length < 2 || points.some(({time}) => !time) || numbers.some(isNaN)) return '';
  const scale = ticks(numbers), least = scale[0], most = scale.at(-1);
  const first = points[0].time, last = points.at(-1).time;
  const x = time => 40 + (time - first) / (last - first || 1) * 190;
  const y = value => 8 + (most - value) / (most - least) * 60, top = y(high ?? most);
  const label = (x, y, anchor, text) => make('text', {x, y, 'text-anchor': anchor}, text);
  const told = points.map(point => `${day(point.when)}: ${said(point)}`);
  const svg = make('svg', {viewBox: '0 0 240 86', role: 'img', 'aria-label': `${name}. ${told.join(', ')}`},
    (low ?? high) === undefined ? '' : make('rect',
      {class: 'range', x: 40, width: 190, y: top, height: y(low ?? least) - top}),
    scale.map(value => [make('path', {class: 'grid', d: `M40 ${y(value)}h190`}),
                        label(36, y(value) + 4, 'end', value)]),
    [first, (first + last) / 2, last].map((time, at) => label(
      x(time), 84, ['start', 'middle', 'end'][at], new Date(time).toISOString().slice(0, 7))),
    lines.map((_, line) => make('g', {class: line % 2 ? 'second' : ''},
      make('polyline', {points: points.map(({time, parts}) => [x(time), y(parts[line].value)]).join(' ')}),
      points.map(({time, parts}, at) => make('circle', {cx: x(time), cy: y(parts[line].value), r: 2.5,
        class: outside(parts[line]) && 'off'}, make('title', {}, told[at]))))));
  const legend = lines.map((line, at) => make('small', {}, `${'\u25cf\u25cb'[at % 2]} ${line.name}`));
  return make('figure', {tabindex: 0, 'aria-label': `${name} over time`}, svg,
    lines.length > 1 ? make('figcaption', {}, legend) : '',
    make('ul', {}, told.map(line => make('li', {}, line))));
}

// ---- Start: with an answer in the address, or anew.
setInterval(() => $('countdown') && countDown(), 1000);
// Opened under another name of the server, the page would not find its storage again when it comes back.
if (!location.href.startsWith(home)) location.replace(home + location.search);
else run(query.has('code') || query.has('error') ? comeBack() : prepare());
"""


DEMO_HTML = Markup("""
<div class="card"><p>This page is an app, not a part of the portal: a public client with the id
<code>demo-app</code>. It finds the server, asks for permission, reads one record and shows every request and
answer. Its source is in this page, to be read and copied.</p>
<noscript><p class="error">The app is a script: it needs JavaScript. The portal's pages do not.</p></noscript>
<form id="ask" hidden><label>Scope to ask for
<textarea id="scope" rows="3" required spellcheck="false"></textarea></label>
<button id="connect">Ask for permission</button></form>
<p id="status" role="status" tabindex="-1"></p></div>
<section id="granted" class="card" hidden></section>
<p id="actions" hidden><button id="refresh">Refresh</button>
<button id="reread" class="btn-default">Read again</button>
<button id="revoke" class="btn-default">Revoke</button></p>
<div id="patient" hidden></div>
""")


@route("GET /demo", "SMART App Launch, RFC 6749, RFC 7636", kind="page")
def demo_page(portal: Portal, request: Request) -> Response:
    """A complete SMART app in one page, its own redirect URI: it shows all that is said, then the patient."""
    app = tag("div", DEMO_HTML, id="app", data_base=portal.browser_base(request))
    told = card("What was said", tag("ol", id="story", class_="story"), id="told", hidden=True)
    return page(portal, request, "A SMART app in one page", app, told,
                style=DEMO_STYLE, script=DEMO_SCRIPT, brand="Demo app")


# ######################################################################## 25 settings, seeds, the portal


# A setting's default, and how --help shows it; to mypy, the value that the attribute's type promises.
option = cast(Any, collections.namedtuple("option", "default text placeholder", defaults=[""]))


def start_needs(good: Good | None, message: str) -> Good:
    """Give back what is good; else refuse to start."""
    if not good:
        raise StartError(message)
    return good


class Settings:
    """Keywords of `Server`, options of the command line. A list may be given as one value. Where open_fhir
    and debug are None, the address decides."""
    host: str = option("127.0.0.1", "address to listen on", "ADDR")
    port: int = option(8000, "port to listen on; 0 takes any free one", "N")
    base_url: list[str] = option(
        [], "the public address, if not the one that each request names; repeatable", "URL")
    name: str = option("SMART Example Clinic", "the provider's name on the pages", "TEXT")
    fhir_server: str | None = option(
        None, "forward FHIR requests to this server (default: the embedded records)", "URL")
    fhir_header: list[str] = option([], "added to every forwarded request; repeatable", '"Name: value"')
    fhir_timeout: float = option(30, "longest wait for the FHIR server", "SECONDS")
    fhir_version: str = option("r4", "version of the embedded records: r4, stu3 or dstu2", "VERSION")
    data: list[Any] = option(
        [], "FHIR JSON to load beside the sample patients: resource, Bundle, NDJSON, .gz of these, or a "
        "folder; none leaves the sample patients out; repeatable", "PATH")
    fixtures: str | Json | None = option(None, "users and clients known from the start, as JSON", "FILE")
    client: list[str] = option([], "a client known from the start; without a secret it is public; repeatable",
                               "ID[:SECRET]=REDIRECT_URI")
    db: str | None = option(None, "keep state in this SQLite file (default: in memory)", "FILE")
    strict: bool = option(False, "SMART 2.2 to the letter: PKCE and aud required, iss in the redirect")
    token_lifetime: float = option(ACCESS_SECONDS, "how long access tokens are good", "SECONDS")
    pkce: bool = option(True, "ask public clients for PKCE (default: on); off lets SMART 1.0's apps in")
    open_fhir: bool | None = option(
        None, "serve /api/open-fhir/ (default: on loopback, without --fhir-server)")
    debug: bool | None = option(None, "serve /oauth/debug/* (default: on loopback only)")
    certfile: str | None = option(None, "serve https with this certificate (PEM)", "FILE")
    keyfile: str | None = option(None, "its key, if not in the same file", "FILE")
    quiet: bool = option(False, "no request log")
    verbose: bool = option(False, "explain each decision in the request log")

    def __init__(self, **chosen: Any) -> None:
        for name in chosen.keys() - OPTIONS.keys():
            raise TypeError(f"{name} is no setting; these are {', '.join(OPTIONS)}")
        for name, option in OPTIONS.items():
            value = chosen.get(name, option.default)
            if isinstance(option.default, list):
                value = list(value) if isinstance(value, (list, tuple, set)) else [value]
            setattr(self, name, value)
        start_needs(self.fhir_version in FHIR_VERSIONS,
                    f"--fhir-version {self.fhir_version}: expected one of {', '.join(FHIR_VERSIONS)}")
        for url in self.base_url:
            start_needs(is_web_url(url) and not re.search("[?#]", url),
                        f"--base-url {url}: give an absolute http or https address, without ? and #")
        self.base_url = [plain_address(url) for url in self.base_url]
        start_needs(self.certfile or not self.keyfile, "--keyfile is given without --certfile")
        start_needs(not (self.quiet and self.verbose), "--quiet and --verbose exclude each other")
        start_needs(self.pkce or not self.strict, "--strict and --no-pkce exclude each other")
        start_needs(not self.fhir_server or all(source == "none" for source in self.data),
                    "--data and --fhir-server exclude each other: load the data into that server")
        if self.fhir_server is not None:
            self.fhir_server = fhir_base(str(self.fhir_server))
        of_http = "accept accept-encoding connection content-length expect host te transfer-encoding upgrade"
        for header in self.fhir_header:
            name = header.partition(":")[0]
            good = re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: *[!-~][ -~]*", header)
            start_needs(good and name.lower() not in of_http.split(),  # not the value: it may be secret
                        f"--fhir-header {name}: expected \"Name: value\", and no name that HTTP itself needs")
        for flag, seconds, most in (("--fhir-timeout", self.fhir_timeout, 3600),
                                    ("--token-lifetime", self.token_lifetime, 2 * 366 * DAY)):
            start_needs(isinstance(seconds, (int, float)) and 0 < seconds <= most,
                        f"{flag} {seconds}: expected seconds, more than 0, at most {most}")
        self.local = is_loopback(self.host)  # only this machine can reach us; else nothing is open by itself
        # Whether anyone, any page in a browser too, may read every record; and ask the controls for tokens.
        by_default = self.local and self.fhir_server is None
        self.serves_open_fhir = by_default if self.open_fhir is None else self.open_fhir
        self.serves_debug = self.local if self.debug is None else self.debug


OPTIONS = {name: given for name, given in vars(Settings).items() if isinstance(given, option)}


def fhir_base(url: str) -> str:
    """A FHIR server's address, to put paths below it: https://a.example/R4 of HTTPS://A.example/R4/."""
    url = url.rstrip("/")
    host = r"(?:[a-z0-9_-]{1,63}(?:\.|(?=[:/]|$)))+|\[[0-9a-f:.]+\]"
    match = re.fullmatch(rf"(?i)(https?://(?:{host})(?::(\d{{1,5}}))?)(/[!-~]*)?", url)
    good = match and is_web_url(match[1]) and 0 < int(match[2] or 80) < 65536
    if not match or not good or re.search(r"[?#\\\"<>]|/\.", match[3] or ""):
        raise StartError(f"--fhir-server {url}: give its FHIR base, http(s), without user, query or fragment")
    return match[1].lower() + (match[3] or "")


# The password is no secret, so its hash may stand here: no start waits for hash_password.
DEMO_PASSWORD = "demo-password"
DEMO_SALT = "s4s-demo"
DEMO_PASSWORD_HASH = "ed504b57dc89d0d90ebb784eb00ff225e805bcb7c4b28e98bd09147072c462c9"
DEMO_USERS = (            # username, name, fhir_user, may open any record
    ("daniel-adams", "Daniel Adams", "Patient/smart-1288992", False),
    ("joseph-ross", "Joseph Ross", "Patient/smart-1081332", False),
    ("clinician", "Clara Clinician", "Practitioner/smart-clinician", True))
DEMO_PATIENTS = (         # username, patient, the patient's name, is it the user, who the user is otherwise
    ("daniel-adams", "smart-1288992", "Daniel Adams", True, None),
    ("daniel-adams", "smart-1032702", "Amy Shaw", False, "RelatedPerson/daniel-adams-amy-shaw"),
    ("joseph-ross", "smart-1081332", "Joseph Ross", True, None))
DEMO_CLIENTS = (          # client_id, secret, redirect URI
    ("test-suite", "demo-secret-s4s", "http://tests.dev.syncfor.science:9003/authorized/"),
    ("api-test", "api-secret", "http://localhost:9001/authorized"))
# What --fixtures may hold, member -> type; a client there is client metadata.
FIXTURES: Json = {"users": list, "clients": list}
FIXTURE_USER: Json = {"username": str, "password": str, "name": str, "fhir_user": str, "patients": list,
                      "email": str, "claims": dict}
FIXTURE_PATIENT: Json = {"patient_id": str, "name": str, "is_user": bool}
JSON_KINDS = {str: "a string", list: "an array", bool: "true or false", dict: "an object"}


class Seeds:
    """Who and what is there from the start, of the demo, --client and --fixtures, as rows of the tables."""
    def __init__(self, settings: Settings):
        samples = "none" not in settings.data  # without the sample patients, nobody signs in as one
        self.users: list[tuple[Any, ...]] = [
            (*user, DEMO_SALT, DEMO_PASSWORD_HASH, any_patient, "{}")
            for *user, any_patient in DEMO_USERS if samples or any_patient]
        self.patients: list[tuple[Any, ...]] = [*DEMO_PATIENTS] if samples else []
        self.clients: dict[str, Client] = {}
        # Not drawn here, secrets may look like anything, and must still get into no log.
        self._secrets = set[str]().union(*map(credentials_in, settings.fhir_header))
        for client_id, secret, uri in DEMO_CLIENTS:
            self.add_client("demo", {"client_id": client_id, "client_secret": secret, "redirect_uris": [uri],
                                     "scope": "launch/patient patient/*.read offline_access"})
        metadata = {"client_id": "demo-app", "client_name": "Demo app", "redirect_uris": ["http://demo"]}
        demo = self.add_client("demo", metadata)
        # It is wherever this server is: its addresses are paths, which nobody else can register.
        demo.metadata.update(redirect_uris=["/demo"], launch_uris=["/demo"])
        for text in settings.client:
            self.add_option(text)
        if settings.fixtures is not None:
            self.add_fixtures(settings.fixtures)
        self.known = pattern_of(self._secrets)

    def write(self, database: sqlite3.Connection, now: float) -> None:
        """Put them in place of older ones."""
        database.executemany("DELETE FROM patients WHERE username = ?", [user[:1] for user in self.users])
        database.executemany("INSERT OR REPLACE INTO users VALUES (?, ?, ?, ?, ?, ?, ?)", self.users)
        database.executemany("INSERT OR REPLACE INTO patients VALUES (?, ?, ?, ?, ?)", self.patients)
        database.executemany("INSERT OR REPLACE INTO clients VALUES (?, ?, ?, ?, 0)", [
            (client.client_id, client.secret_hash, json.dumps(client.metadata), now)
            for client in self.clients.values()])

    def add_client(self, where: str, client: Any) -> Client:
        """Add a client, public if it has no secret and no keys; errors say `where` it comes from."""
        start_needs(isinstance(client, dict), f"{where} is not a JSON object")
        given = dict(client)
        client_id, secret = given.pop("client_id", None), given.pop("client_secret", None)
        start_needs(isinstance(client_id, str) and re.fullmatch(r"[ -~]+", client_id),
                    f"{where}: client_id is missing or not a string of ASCII")  # RFC 6749 appendix A.1
        start_needs(secret is None or (isinstance(secret, str) and secret),
                    f"{where}: client_secret: expected a string")
        method = "private_key_jwt" if {"jwks", "jwks_uri"} & given.keys() else "none"
        method = "client_secret_basic" if secret else method
        try:
            kept = client_metadata({"token_endpoint_auth_method": method, **given}, listed=True)
        except PortalError as error:
            raise StartError(f"{where}: {error.description}")
        method, but = kept["token_endpoint_auth_method"], "but" if secret else "without"
        start_needs(method.startswith("client_secret") == bool(secret),
                    f"{where}: token_endpoint_auth_method is {method}, {but} a client_secret")
        self._secrets.add(secret or "")
        self.clients[client_id] = Client(client_id, hash_secret(secret) if secret else None, kept)
        return self.clients[client_id]

    def add_option(self, text: str) -> None:
        """Add what --client says: a client, or one more redirect URI of an earlier one."""
        where = f"--client {re.split('[:=]', text)[0]}"  # not the rest: there may be a secret in it
        match = start_needs(re.fullmatch(r"([^:=]+)(?::([^:=]+))?=([A-Za-z][A-Za-z0-9+.-]*:\S+)", text),
                            f"{where}: expected ID=REDIRECT_URI or ID:SECRET=REDIRECT_URI; a client with : "
                            "or = in its id or secret goes into --fixtures")
        client_id, secret, uri = match.groups()
        earlier = self.clients.get(client_id)
        client = self.add_client(where, {
            "client_id": client_id, "client_secret": secret, "redirect_uris": [uri]})
        if earlier:
            start_needs(client.secret_hash in (None, earlier.secret_hash),
                        f"{where}: it was given with another secret before")
            earlier.metadata["redirect_uris"].append(uri)
            self.clients[client_id] = earlier

    def add_fixtures(self, source: str | Json) -> None:
        """Add the users and clients of a fixtures file, or of an object such as could be in one."""
        where, fixtures = "fixtures", source  # type: str, Any
        try:
            if isinstance(source, str):
                where = f"--fixtures {source}"
                with open(source, encoding="utf-8-sig") as file:  # Windows' editors write a mark first
                    fixtures = json.load(file)
            json.dumps(fixtures, ensure_ascii=False).encode("utf-8")
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise StartError(f"{where}: {error}; give a file of JSON")
        check_fixture(f"{where}: the whole", fixtures, FIXTURES)
        salt, hashed = new_token(), functools.cache(hash_password)  # slow: once for users of one password
        for number, user in enumerate(fixtures.get("users", [])):
            place = f"{where}: users[{number}]"
            check_fixture(place, user, FIXTURE_USER, "username", "password")
            username, name = user["username"], user.get("name") or user["username"]
            start_needs(re.fullmatch(r"[!-~]{1,255}", username),
                        f"{place}: username is not 1 to 255 characters of ASCII without spaces")
            password = hashed(user["password"], salt)
            email = {"email": user["email"]} if "email" in user else {}
            claims = json.dumps({**user.get("claims", {}), **email})
            self.users.append((username, name, user.get("fhir_user"), salt, password, False, claims))
            for index, patient in enumerate(user.get("patients", [])):
                check_fixture(f"{place}.patients[{index}]", patient, FIXTURE_PATIENT, "patient_id")
                patient_id, is_user = patient["patient_id"], patient.get("is_user", False)
                start_needs(FHIR_ID.fullmatch(patient_id), f"{place}.patients[{index}]: patient_id "
                            f"{patient_id!r} is no id of FHIR: 1 to 64 of A-Z, a-z, 0-9, - and .")
                self.patients.append((username, patient_id, patient.get("name") or patient_id, is_user, None))
        for number, client in enumerate(fixtures.get("clients", [])):
            self.add_client(f"{where}: clients[{number}]", client)


def check_fixture(place: str, value: Any, known: Json, *needed: str) -> None:
    """Refuse a part of the fixtures that is no object of known members, or lacks one."""
    start_needs(isinstance(value, dict), f"{place} is not a JSON object")
    for name, inner in value.items():
        start_needs(name in known, f"{place} has an unknown member {name}; known are {', '.join(known)}")
        start_needs(isinstance(inner, known[name]), f"{place}: {name} is not {JSON_KINDS[known[name]]}")
    for name in needed:
        start_needs(value.get(name), f"{place} has no {name}")


# The status that the texts give an error code, if not 400 (RFC 6749 section 5.2, RFC 6750 section 3.1).
ERROR_STATUS = {"invalid_client": 401, "invalid_token": 401, "insufficient_scope": 403, "server_error": 500,
                "temporarily_unavailable": 503}


class Fault(NamedTuple):
    """Trouble that a test ordered."""
    status: int              # HTTP's; 0: none
    error: str
    retry_after: int | None  # seconds
    delay: float             # seconds
    drop: bool               # close the connection without an answer
    change: Json             # the members of a right answer that are wrong; None: missing

    def changed(self, response: Response) -> Response:
        """An answer with its members changed. One that is no JSON object stays as it is."""
        with contextlib.suppress(ValueError, RecursionError):
            right = json.loads(response.body) if self.change else None
            if isinstance(right, dict):
                wrong = {**right, **self.change}
                kept = {name: wrong[name] for name in wrong if self.change.get(name, "") is not None}
                response.body = json.dumps(kept).encode()
        return response

    def refusal(self) -> PortalError:
        """An error like the real one; a PageError where only a status was ordered."""
        headers = [] if self.retry_after is None else [("Retry-After", str(self.retry_after))]
        if self.error == "invalid_client":
            headers.append(challenge("Basic"))
        elif self.status == 401 or self.error == "insufficient_scope":
            headers.append(challenge(error=self.error or "invalid_token"))
        kind = PortalError if self.error else PageError
        usual = {429: "slow_down", 503: "temporarily_unavailable"}.get(self.status, "server_error")
        return kind(self.error or usual, "a test made this request fail", self.status, headers)


def check_tables(file: sqlite3.Connection, path: str, schema: str) -> None:
    """StartError for a file that another version kept: its columns may mean something else, and whose each
    record is was told by its rules, which may have had a hole. DatabaseError for another program's."""
    made = "SELECT name, sql FROM sqlite_master WHERE sql NOT NULL"
    there, ours = (dict(map(tuple, database.execute(made))) for database in (file, empty_database(schema)))
    are_same = all(there.get(name, sql) == sql for name, sql in ours.items())  # or will be made yet
    if there and not (are_same and "kept_by" in there):
        if there.keys().isdisjoint({"kept_by", "grants"}):  # 0.1.0 had the latter only
            raise sqlite3.DatabaseError("made by another program")
        file.close()  # Windows lets nobody delete a file that is open
        raise StartError(f"--db {path}: kept by another version of s4s_proxy.py than {__version__}: "
                         "use that one, or name another file")


class Portal:
    """One portal: settings, clock, state, records. It knows nothing of sockets."""
    def __init__(self, settings: Settings):
        self.settings, self.clock = settings, Clock()
        self.seeds = Seeds(settings)       # before anything is open that would have to be closed
        self.state = Store(settings.db, STATE_SCHEMA)
        self.address = ""                  # http://127.0.0.1:8000, known when the socket listens
        self.log: Callable[..., None] = lambda *lines: None
        self.stopping = threading.Event()  # set when the server stops, so that nobody waits on
        self.sockets = OpenSockets()       # all connections, to apps and to the FHIR server
        self.faults: dict[str, list[Iterator[Fault]]] = {}  # of an endpoint, each order of a test
        self.recorded: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=1000)  # RecordedRequest
        self.key_lock = threading.Lock()   # held while the signing key is made
        self.key_sets: dict[str, tuple[float, bytes]] = {}  # what clients' jwks_uri gave: until when, text
        with contextlib.ExitStack() as undo:
            undo.callback(self.state.close)
            self.records: Records = (
                ForwardedRecords(self) if settings.fhir_server else EmbeddedRecords(settings, self.clock))
            undo.callback(self.records.close)
            try:
                with self.state.transaction() as database:
                    self.seeds.write(database, self.clock.now())
            except sqlite3.Error as error:
                raise StartError(f"--db {settings.db}: {error}; name a file that can be written")
            undo.pop_all()

    def reset(self) -> None:
        """Back to the start: the clock too, and every client, grant, token and session made since gone."""
        for kept in (self.faults, self.recorded, self.key_sets):
            kept.clear()
        for memory in MEMORIES:
            memory.clear()
        with self.state.transaction() as database:
            self.records.era += 1  # in here: who saw it sees no row of before, who did not writes none after
            tables = "pages tokens grants pending launches sessions assertions clients patients users"
            for table in [*tables.split(), "forgotten"]:  # the last, which gets what others lose
                database.execute(f"DELETE FROM {table}")
            self.seeds.write(database, self.clock.now() - self.clock.offset)
        self.clock.advance(-self.clock.offset)  # no sooner: nothing is left that would be good once more
        self.records.reset()  # last: nobody has a token to write with any more

    def close(self) -> None:
        """Close the databases and what else is open."""
        self.state.close()
        self.records.close()

    def client(self, client_id: str) -> Client | None:
        """A registered client, or None."""
        row = self.state.row("SELECT * FROM clients WHERE client_id = ?", client_id)
        if not row:
            return None
        metadata, itself = json.loads(row["metadata"]), bool(row["registered_itself"])
        return Client(client_id, row["secret_hash"], metadata, itself)

    def user(self, username: str) -> Row | None:
        """A user's row. A patient who was loaded signs in by id: that account is made when asked for."""
        sql = "SELECT * FROM users WHERE username = ?"
        has_account = "SELECT 1 FROM patients WHERE patient_id = ? AND is_user"
        row = self.state.row(sql, username)
        name = self.records.patient_name(username) if self.records.has_accounts and not row else None
        if name is None or self.state.row(has_account, username):
            return row
        with self.state.transaction() as database:
            account = username, name, f"Patient/{username}", DEMO_SALT, DEMO_PASSWORD_HASH
            database.execute("INSERT OR IGNORE INTO users VALUES (?, ?, ?, ?, ?, 0, '{}')", account)
            database.execute("INSERT OR IGNORE INTO patients VALUES (?, ?, ?, 1, NULL)",
                             (username, username, name))
        return self.state.row(sql, username)

    def patients_of(self, username: str, text: str = "") -> dict[str, str]:
        """The patients a user may open, id -> name, the user's own first; with `text`, those of this id or
        with a name that has it. Of one who may open any record, the first few."""
        user = self.user(username)
        if user and user["any_patient"]:
            patients = dict(self.records.find_patients(text))
            with contextlib.suppress(FhirError):  # a server may dislike a name where an id belongs
                if FHIR_ID.fullmatch(text) and (name := self.records.patient_name(text)):
                    patients[text] = name
            return patients
        sql = "SELECT * FROM patients WHERE username = ? ORDER BY is_user DESC, name"
        word = re.compile(r"\b" + re.escape(text), re.IGNORECASE)
        return {row["patient_id"]: row["name"] for row in self.state.rows(sql, username)
                if not text or row["patient_id"] == text or word.search(row["name"])}

    def patient_name(self, username: str, patient_id: str) -> str | None:
        """A patient's name; None if this user may not open that record."""
        user = self.user(username)
        if user and user["any_patient"]:
            return self.records.patient_name(patient_id)
        return self.patients_of(username).get(patient_id)

    def fhir_user(self, username: str, patient_id: str | None) -> str:
        """The resource that stands for a user (SMART: fhirUser), for another's record maybe another one."""
        row = self.state.row(
            "SELECT coalesce((SELECT fhir_user FROM patients WHERE username = ? AND patient_id = ?), "
            "(SELECT nullif(fhir_user, '') FROM users WHERE username = ?), "
            "(SELECT 'Patient/' || patient_id FROM patients WHERE username = ? AND is_user), '')",
            username, patient_id, username, username)
        return str(row[0]) if row else ""

    def meet_fault(self, endpoint: str) -> Fault | None:
        """Do what a test ordered for this endpoint: wait, then refuse; ConnectionAbortedError for a drop. To
        change the answer is left to the caller."""
        orders = self.faults.get(endpoint, ())
        fault = next(itertools.chain.from_iterable(orders), None)  # of the first order that is not used up
        if fault:
            self.stopping.wait(fault.delay)
            if fault.drop:
                raise ConnectionAbortedError
            if fault.status:
                raise fault.refusal()
        return fault

    def log_bug(self, during: str, error: Exception) -> None:
        """Log a bug of ours: what and where, but no value and no line of source, which may hold a secret."""
        import traceback  # takes long to import, and nobody should need it
        lines = [f"BUG {type(error).__name__} in {scrubbed(self, during)}"]
        for call in traceback.extract_tb(error.__traceback__):
            lines.append(f"    {call.filename}:{call.lineno} {call.name}")
        self.log(*lines)

    def base(self, request: Request) -> str:
        """The name by which this request's sender knows the server: see section 5."""
        if not self.settings.base_url:
            return f"{request.scheme}://{request.host}" if request.host else self.address
        return self.base_url_of(request.host) or self.settings.base_url[0]

    def base_url_of(self, host: str) -> str | None:
        """The base URL that a Host names: in any letters, and some clients add the scheme's own port."""
        names = host.lower(), re.sub(":(80|443)$", "", host.lower())
        return next((url for url in self.settings.base_url if urlsplit(url).netloc in names), None)

    def browser_base(self, request: Request | None = None) -> str:
        """The address for people's browsers: the first --base-url, else `base`, else the one listened on."""
        if self.settings.base_url:
            return self.settings.base_url[0]
        return self.base(request) if request else self.address

    def is_ours(self, host: str) -> bool:
        """Whether a Host can only mean this server: a base URL's, loopback's and, where others can reach it,
        the one listened on or any IP address. Others may be pointed here by whoever owns them."""
        if self.settings.base_url and self.base_url_of(host):
            return True
        name, _, port = host.rpartition(":")
        name = name if port.isdigit() else host
        return is_loopback(name) or (not self.settings.local and (
            bool(re.fullmatch(r"\[.*\]|\d+(\.\d+){3}", name)) or name.lower() == self.settings.host.lower()))


# ######################################################################## 26 test controls and Server

MAX_LOAD = 64 << 20          # bytes of a body for /oauth/debug/load
FAULTS = sorted({served.fault for served in ROUTES if served.fault})  # the endpoints that can be made to fail

Control = TypeVar("Control", bound=Callable[..., Any])
CONTROLS: dict[str, Callable[..., Any]] = {}


def control(path: str, answer: Callable[[Any], Json | None] = lambda given: given, whole: str = "",
            required: str = "", **aliases: str) -> Callable[[Control], Control]:
    """Declare the other door of a control: POST /oauth/debug/`path`, whose JSON members are its parameters.
    `answer` makes JSON of what the control gives (None: 204); `whole` is the parameter that the body is as a
    whole; `required` names those that HTTP needs; `aliases` are other member names."""
    def declare(function: Control) -> Control:
        CONTROLS[function.__name__], code = function, function.__code__
        names = code.co_varnames[1:code.co_argcount + code.co_kwonlyargcount]  # inspect takes long to import
        known = ", ".join(names) or "nothing"

        def over_http(portal: Portal, request: Request) -> Response:
            members = request.json() if names or request.body else {}
            members = {aliases.get(name, name): value for name, value in members.items()}
            if whole:
                members = {whole: members}
            for name in members:
                need(name in names, f"{name}: unknown; {function.__name__} takes {known}")
            for name in required.split():
                need(name in members, f"{name} is missing")
            controls = Controls(portal, portal.browser_base(request), request.notes)
            given = answer(function(controls, **members))
            return Response(204) if given is None else json_response(given)
        over_http.__doc__, over_http.__name__ = function.__doc__, f"debug_{function.__name__}"
        route(f"POST /oauth/debug/{path}", "test control", kind="debug")(over_http)
        return function
    return declare


class Controls:
    """What a test may do that an app may not: methods of `Server`, and doors over HTTP (see `control`). They
    raise PortalError, which over HTTP is the answer."""
    portal: Portal
    url: str  # the base URL, and issuer: the first base_url, or the address listened on; over HTTP, as asked
    notes: list[str] | None = None  # over HTTP: the request's, to which what is decided on the way is added

    def __init__(self, portal: Portal, url: str = "", notes: list[str] | None = None):
        self.portal, self.url, self.notes = portal, url, notes

    def register_client(self, **metadata: Any) -> Json:
        """Register an app, by the members of RFC 7591 section 2: over HTTP that is /oauth/register."""
        return register_client(self.portal, metadata)

    @control("token", required="client_id username", user_name="username")
    def issue_token(self, *, client_id: str = "test-suite", username: str = "daniel-adams",
                    scope: str | None = None, patient_id: str | None = None,
                    access_lifetime: float | None = None, approval_expires: float | None = None) -> Json:
        """Tokens without the browser: as if this user had approved this client for this patient (S4S).

        access_lifetime is in seconds, approval_expires a Unix time (default: in seven days). Where either is
        past, the tokens are born expired."""
        portal, now = self.portal, self.portal.clock.now()
        client = need(portal.client(need_text("client_id", client_id)),
                      f"client_id: {client_id!r} is not registered here")
        known_user(portal, username)
        asked = client.scope if scope is None else need_text("scope", scope)
        granted = need(served_scope(portal, asked, asked), f"scope: nothing of {asked!r} can be granted",
                       "invalid_scope")
        lifetime = need_lifetime(access_lifetime, now)
        until = now + 7 * DAY if approval_expires is None else approval_expires
        until = max(0, need_number(
            "approval_expires", until, "a Unix time, in 9999 at most", -sys.float_info.max, LAST_SECOND))
        patient = users_patient(portal, username, patient_id, needs_patient(granted))
        grant = {"client_id": client.client_id, "username": username, "patient_id": patient, "scope": granted,
                 "approval_expires": until, "issuer": self.url}
        with portal.state.transaction() as database:
            row = store_grant(database, grant, now)
            return issue_tokens(portal, database, row, granted, now, True, lifetime)

    @control("authorize", lambda url: {"redirect_to": url}, required="url username")
    def approve(self, url: str, username: str, patient_id: str | None = None, encounter_id: str | None = None,
                security_labels: Sequence[str] | None = None, approval_expires: str | None = None,
                deny: bool = False, access_lifetime: float | None = None) -> str:
        """Play the browser: sign in, choose the patient, answer the consent page. Gives where the app is
        called back, with a code or with an error.

        PortalError where a person would see an error page. Without patient_id it is the launch's patient, or
        the user's own; without security_labels all offered stay checked; approval_expires is a date (default:
        a year from today); access_lifetime is that of each access token of this authorization, in seconds."""
        portal, request, now = self.portal, authorization_request(self.portal, url), self.portal.clock.now()
        if self.notes is not None:
            request.notes = self.notes
        known_user(portal, username)
        try:
            request_id = begin_authorization(portal, request, Fields(request.pairs()), self.url)
        except RedirectError as error:
            return error.url
        client, details = pending_request(portal, request_id)
        must(isinstance(deny, bool), "deny", "true or false", deny)
        if deny:
            return decide(portal, request_id, None)
        chosen = TO_CHOOSE if patient_id is None else need_text("patient_id", patient_id)
        patient = whose_record(portal, username, details, chosen)
        if patient == TO_CHOOSE:
            own = users_patient(portal, username, None, needed=True)
            patient = whose_record(portal, username, details, str(own))
        if security_labels is None:
            security_labels = offered_categories(portal, client, details["scope"])
        must(isinstance(security_labels, (list, tuple)) and {*map(type, security_labels)} <= {str},
             "security_labels", "an array of strings", security_labels)
        day = day_of(now, 1) if approval_expires is None else need_text("approval_expires", approval_expires)
        visit = "" if encounter_id is None else need_text("encounter_id", encounter_id)
        grant = new_grant(portal, client, username, patient, details, security_labels, day, visit, now)
        return decide(portal, request_id, {**grant, "access_lifetime": need_lifetime(access_lifetime, now)})

    # The launch URL ends with the parameters iss and launch.
    @control("launch", lambda url: {"launch_url": url, **dict(parse_qsl(url.partition("?")[2])[-2:])})
    def launch(self, client_id: str | None = None, launch_uri: str | None = None, username: str | None = None,
               patient_id: str | None = None, encounter_id: str | None = None, intent: str | None = None,
               need_patient_banner: bool = True, fhir_context: list[Json] | None = None) -> str:
        """Launch an app as the EHR does, without the page; gives the app's launch URL."""
        return str(create_launch(
            self.portal, self.url, client_id=client_id, launch_uri=launch_uri,
            username=username, patient_id=patient_id, encounter_id=encounter_id, intent=intent,
            need_patient_banner=need_patient_banner,
            fhir_context=need_json("fhir_context", fhir_context))["launch_url"])

    @control("clock", lambda now: {"now": now}, required="seconds")
    def advance(self, seconds: float) -> float:
        """Move the portal's clock by seconds, which may be fractional; gives its time, in Unix seconds."""
        now = self.portal.clock.now()
        return self.portal.clock.advance(need_number(
            "seconds", seconds, "a number that keeps the clock from 1970 to 9990", -now, LAST_NOW - now))

    @control("fail", required="endpoint")
    def fail(self, endpoint: str, status: int | None = None, error: str | None = None,
             retry_after: int | None = None, delay: float = 0, drop: bool = False,
             change: Json | None = None, times: int | None = 1) -> Json:
        """Make an endpoint's next request fail, or so many, after those that earlier orders fail.

        status is HTTP's, error a code of the endpoint's text (alone: with the status that the text gives it),
        retry_after and delay are seconds; drop closes the connection unanswered; times None is until reset.
        A delay alone delays. With change the request succeeds, and these members replace those of its JSON
        answer, None takes one away: an answer that is no JSON object, or an error, stays as it is."""
        must(endpoint in FAULTS, "endpoint", f"one of {', '.join(FAULTS)}", endpoint)
        need(error is None or re.fullmatch(r"[!#-\[\]-~]+", need_text("error", error)),
             f"error: {error!r} is not an error code (RFC 6749 section 5.2)")
        must(drop in (True, False), "drop", "true or false", drop)
        for name, value, least, most in (("status", status, 400, 599), ("times", times, 1, sys.maxsize),
                                         ("retry_after", retry_after, 0, sys.maxsize)):
            whole = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
            must(value is None or whole, name, f"a whole number, {least} to {most}", value)
        wait = need_number("delay", delay, "0 to 300 seconds", 0, 300)
        if not status and error:
            status = ERROR_STATUS.get(error, 400)
        elif not status and retry_after is not None:
            status = 503
        members, fails = need_json("change", change) or {}, status or drop
        must(change is None or isinstance(change, dict), "change", "an object of members", change)
        need(fails or wait or members,
             "fail: give at least one of status, error, retry_after, delay, drop, change")
        need(not (members and fails),
             "change: the request succeeds; expected no status, error, retry_after or drop beside it")
        need(not members or endpoint != "authorize", "change: authorize answers with no JSON")
        fault = Fault(status or 0, error or "", retry_after, wait, drop, members)
        order = itertools.repeat(fault, sys.maxsize if times is None else times)
        self.portal.faults.setdefault(endpoint, []).append(order)
        return {"endpoint": endpoint, "times": times}

    @control("load", lambda stored: {"stored": stored}, whole="resource")
    def load(self, resource: Json) -> int:
        """Add a resource, or the resources of a Bundle, to the embedded records; gives how many were stored.
        Those of the same type and id are replaced, until reset. All or none."""
        return self.portal.records.load(resource)

    @control("reset")
    def reset(self) -> None:
        """Back to the start: users, clients, records, clock; grants, tokens, faults and requests are gone."""
        self.portal.reset()

    @property
    def requests(self) -> list[RecordedRequest]:
        """The last requests, oldest first, as they came."""
        return [RecordedRequest(self.portal, *recorded) for recorded in list(self.portal.recorded)]


def must(good: object, name: str, what: str, value: Any) -> None:
    """Refuse a control's parameter that is something else."""
    need(good, f"{name}: expected {what}, got {json.dumps(value, default=str)}")


def need_text(name: str, value: Any) -> str:
    """A string with something in it."""
    must(isinstance(value, str) and value, name, "a string", value)
    return str(value)


def need_json(name: str, value: Any) -> Any:
    """A copy of a value, as JSON gives it back; in Python it could be anything."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise PortalError("invalid_request", f"{name}: expected what JSON can say: {error}")


def need_number(name: str, value: Any, what: str, least: float, most: float) -> float:
    """A number within bounds, and so not NaN; it may come as a string."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    must(least <= number <= most, name, what, value)
    return number


def need_lifetime(seconds: Any, now: float) -> float | None:
    """How long an access token shall be good, if that is said; less than nothing, and it is born expired."""
    if seconds is None:
        return None
    what = "seconds that end in 9999 at most"
    return max(-now, need_number("access_lifetime", seconds, what, -sys.float_info.max, LAST_SECOND - now))


def known_user(portal: Portal, username: Any) -> Row:
    """A user; PortalError for a stranger."""
    return need(portal.user(need_text("username", username)), f"username: there is no user {username!r}")


def users_patient(portal: Portal, username: str, patient_id: Any, needed: bool) -> str | None:
    """The patient asked for, if this user may open the record; else the user's own, or the only one."""
    if patient_id is not None:
        need(portal.patient_name(username, need_text("patient_id", patient_id)) is not None,
             f"patient_id: {patient_id!r} is not a patient of {username!r}")
        return str(patient_id)
    rows = portal.state.rows("SELECT patient_id, is_user FROM patients WHERE username = ? "
                             "ORDER BY is_user DESC LIMIT 2", username)
    if len(rows) == 1 or (rows and rows[0]["is_user"]):
        return str(rows[0]["patient_id"])
    need(not needed, f"patient_id is missing, and {username!r} has no record of their own")
    return None


def authorization_request(portal: Portal, url: Any) -> Request:
    """The request that a browser would send to an app's authorization URL."""
    parts = urlsplit(url if is_web_url(need_text("url", url)) else "")
    request = Request("GET", parts.path + "?" + parts.query, {"host": parts.netloc}, scheme=parts.scheme)
    need(request.path == "/oauth/authorize", f"url: {url!r} is not an address of /oauth/authorize")
    check_host(portal, request)
    return request


@route("GET /oauth/debug/introspect", "S4S", kind="debug")
def debug_introspect(portal: Portal, request: Request) -> Response:
    """All that is known of an access or refresh token, its values too; no client needs to ask (S4S)."""
    value = Fields(request.pairs()).need("token")
    now, row = portal.clock.now(), known_token(portal, value)
    if not row:
        return json_response({"active": False})
    refresh, access, expires = row["refresh_token"], value, row["expires"]  # type: str, str | None, float
    if row["kind"] == "refresh":
        newest = "SELECT token, expires FROM tokens WHERE refresh_token = ? ORDER BY rowid DESC LIMIT 1"
        refresh, (access, expires) = value, portal.state.row(newest, value) or (None, expires)
    return json_response({
        "active": is_active(row, now), "access_token": access, "refresh_token": refresh,
        "access_expires": http_date(expires), "approval_expires": http_date(row["approval_expires"]),
        "client_id": row["client_id"], "scope": row["token_scope"], "token_type": "Bearer",
        "security_labels": json.loads(row["security_labels"]), "username": row["username"]})


@route("GET,DELETE /oauth/debug/requests", "test control", kind="debug")
def debug_requests(portal: Portal, request: Request) -> Response:
    """What the app really sent, oldest first, without secrets; DELETE forgets it."""
    if request.method == "DELETE":
        portal.recorded.clear()
        return Response(204)
    return json_response({"requests": [recorded.redacted() for recorded in Controls(portal).requests]})


class RecordedRequest:
    """A request that came in, as it was; `repr` and `redacted` leave the secrets out."""
    def __init__(self, portal: Portal, method: str, path: str, query: str, status: int,
                 headers: Mapping[str, str], body: bytes, client_id: str, username: str):
        self.method, self.path, self.query, self._portal = method, path, query, portal
        self.status, self.headers = status, dict(headers)  # 0: a test ordered a drop; names in lower case
        self.body, self._cut = body.decode("utf-8", "replace"), len(body) == MAX_RECORDED_BODY
        self.client_id, self.username = client_id, username

    def redacted(self, own: Collection[str] = ()) -> Json:
        """The same as JSON, fit for a log: whatever may hold a secret is replaced. own: those that came with
        this request, learnt at a first go: it may have them elsewhere, too."""
        found = pattern_of(own).pattern if len(own) <= MAX_OWN_SECRETS else "(?s).+"
        shown = Redaction(functools.partial(gave_out, self._portal), self.path.startswith("/api/"),
                          re.compile(f"{found}|{self._portal.seeds.known.pattern}"))
        media_type, body = self.headers.get("content-type", "").lower(), self.body and REDACTED
        if "x-www-form-urlencoded" in media_type or ("json" in media_type and self.body[:1] in ("{", "[")):
            # Of any other kind, nobody can tell where in it a secret stands. Of half a secret neither.
            body = shown.text(f"{self.body.rpartition('&')[0]}&{REDACTED}" if self._cut else self.body)
        secret = {name for name in self.headers if _SECRET_HEADER.search(name)}
        shown.came.update(*(credentials_in(f"{name}: {self.headers[name]}") for name in secret))
        headers = {shown.text(name): REDACTED if name in secret else shown.text(value)
                   for name, value in self.headers.items()}
        told = {"method": self.method, "path": shown.text(self.path), "query": shown.text(self.query),
                "status": self.status, "headers": headers, "body": body,
                "client_id": shown.text(self.client_id), "username": shown.text(self.username)}
        return self.redacted(shown.came) if shown.came and not own else told

    def __repr__(self) -> str:
        return f"RecordedRequest({', '.join(f'{name}={value!r}' for name, value in self.redacted().items())})"


REDACTED = "[redacted]"
_SECRET_HEADER = re.compile("auth|cookie|token|secret|passw|key|credential|session|assertion")
_SECRET_NAME = re.compile(  # a field's, whatever kind of request it is in
    "secret|passw|^pwd?$|assertion$|authorization|cookie|verifier|credential|api[-_]?key|_token|id_token_hint")
_OAUTH_NAMES = frozenset(("code", "launch", "request", "token"))       # where FHIR's search has harmless ones
_KEY_NAMES = frozenset(("d", "p", "q", "dp", "dq", "qi", "k", "oth"))  # of a private key (RFC 7518 section 6)
_SIGNED_OR_KEY = re.compile(
    r"(?s)(?<![\w-])eyJ[\w-]+\.[\w-]+\.[\w-]*|-----BEGIN[A-Z +]*PRIVATE.KEY-----.*?(?:-----END|$)")
_FIELD = re.compile(r"""([^\s&?#;"'=]+)(?:=("[^"]*"|'[^']*'|[^\s&"']*))?""")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_LOOKS_DRAWN = re.compile("[A-Za-z0-9_-]{32,}")                           # UUIDs too
_DRAWN_WITHIN = re.compile(f"(?=({_UUID.pattern}|[A-Za-z0-9_-]{{32}}))")  # at each place: they may overlap
_ESCAPED = re.compile(r"\\u([0-9A-Fa-f]{4})")
MAX_OWN_SECRETS = 20  # of one request, to be found wherever else it has them; of one with more, all is hidden


def pattern_of(known: Iterable[str]) -> re.Pattern[str]:
    """What finds these secrets in a text, the short ones as words; spaces may be + there, as in forms, and
    what is not ASCII may be in any encoding. A long one is known by its beginning: to look for all of it at
    each place of a text takes too long; what follows is hidden up to a & that is not its own."""
    patterns = []
    for secret in sorted(filter(None, known), key=len, reverse=True):
        head, rest = secret[:32], secret[32:]
        text = re.sub(r"[^\0-\x7f]+", r"[^\\0-\\x7f]+", re.sub(r"\\[ +]", "[ +]", re.escape(head)))
        text += f"(?:[^&]*&){{0,{rest.count('&')}}}[^&]*" if rest else ""
        patterns.append(text if len(secret) >= 8 else rf"(?<![^\W_]){text}(?![^\W_])")
    return re.compile("|".join(patterns) or "(?!)")


class Redaction:
    """Hides the secrets in what a client sent: by value, wherever they stand, those that `known` finds, and
    those drawn here, which `is_secret` knows; by the field's name what else `came`: other servers', and what
    is kept as a hash or not at all."""
    def __init__(self, is_secret: Callable[[str], bool], of_fhir: bool, known: re.Pattern[str]):
        self.is_secret, self.names = is_secret, frozenset[str]() if of_fhir else _OAUTH_NAMES
        self.known, self.came = known, set[str]()

    def text(self, text: str, depth: int = 0) -> str:
        """A path, query, form, header, JSON, or any other text; also what is encoded in it."""
        if depth > 8:
            return REDACTED
        if text.lstrip("+ \t\r\n")[:1] in ("{", "["):
            for spaced in (text.lstrip("+"), text.replace("+", " ")):
                with contextlib.suppress(ValueError, RecursionError):
                    return json.dumps(self.json(json.loads(spaced), depth + 1))
            return REDACTED

        def shown(match: re.Match[str]) -> str:
            name, value = match.groups()
            if value is None:
                return self.word(name, depth)
            plain = unquote(name).lower()
            if plain in self.names or _SECRET_NAME.search(plain):
                self.came.add(decode_plus(value).strip("\"'"))
                return f"{self.word(name, depth)}={REDACTED}"
            return f"{self.word(name, depth)}={self.text(value, depth + 1)}"
        hidden = _FIELD.sub(shown, _SIGNED_OR_KEY.sub(REDACTED, self.known.sub(REDACTED, text)))
        return REDACTED if self.known.search(unquote(hidden)) else hidden  # a part encoded, a part not

    def json(self, value: Any, depth: int) -> Any:
        """JSON, decoded."""
        if isinstance(value, dict):
            secret = {name for name in value if _SECRET_NAME.search(name.lower())
                      or name.lower() in self.names or (self.names and name in _KEY_NAMES)}
            self.came.update(value[name] for name in secret if isinstance(value[name], str))
            return {self.text(name, depth): REDACTED if name in secret else self.json(inner, depth)
                    for name, inner in value.items()}
        if isinstance(value, list):
            return [self.json(inner, depth) for inner in value]
        return self.text(value, depth) if isinstance(value, str) else value

    def word(self, word: str, depth: int) -> str:
        """A word, which may be a secret, hold one, or be the encoding of a text."""
        plain = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), unquote(word))
        if plain != word:
            hidden = self.text(plain, depth + 1)
            return word if hidden == plain else quote(hidden, safe="/[]", errors="replace")
        return _LOOKS_DRAWN.sub(self.drawn, word)

    def drawn(self, match: re.Match[str]) -> str:
        """Characters such as drawn secrets have: hidden if one is among them, whatever is glued to it."""
        return REDACTED if any(map(self.is_secret, _DRAWN_WITHIN.findall(match[0]))) else match[0]


def credentials_in(header: str) -> set[str]:
    """Credentials, and cookies' values, in a header line of a name that says there are some."""
    name, _, value = header.partition(":")
    secret = _SECRET_HEADER.search(name.lower())
    return set(re.findall(r"(?:^|[=\s])([^\s;,=]{8,}=*)(?=[\s;,]|$)", value)) if secret else set()


def gave_out(portal: Portal, word: str) -> bool:
    """Whether a word is a secret that this portal drew: live, spent or forgotten."""
    word = word.lower() if _UUID.fullmatch(word) else word
    known = ("SELECT 1 FROM tokens WHERE token = ? UNION ALL SELECT 1 FROM sessions WHERE session_id = ? "
             "UNION ALL SELECT 1 FROM launches WHERE launch = ? UNION ALL SELECT 1 FROM forgotten "
             "WHERE secret = ? UNION ALL SELECT 1 FROM clients WHERE secret_hash = ? LIMIT 1")
    return bool(portal.state.row(known, word, word, word, word, hash_secret(word)))


def scrubbed(portal: Portal, text: str) -> str:
    """A text without clients' secrets and what looks like one drawn here: an app may send them anywhere."""
    return Redaction(bool, of_fhir=True, known=portal.seeds.known).text(text)


def write_log(*lines: str) -> None:
    """Lines of the log, on standard error, in one write so that threads don't mix theirs."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it: answer all the same
        sys.stderr.write("".join(printable(line) + "\n" for line in lines))
        sys.stderr.flush()


class Server(Controls):
    """A running portal: what a test starts, talks to and stops. Any number may run at once.

        with s4s_proxy.Server() as portal:
            token = portal.issue_token(scope="patient/*.rs")["access_token"]

    Takes the command line's options as keywords; the port is any free one, and there is no log unless
    verbose. Its other methods are the test controls."""
    fhir_url: str       # the FHIR base that apps use, with a token
    open_fhir_url: str  # the one that needs none
    address: str        # the address listened on
    host: str           # its host, as a URL has it; loopback's where the server listens on every address
    port: int           # its port

    def __init__(self, **settings: Any):
        self.settings = Settings(**{"port": 0, "quiet": not settings.get("verbose"), **settings})
        self._listener: Listener | None = None

    def start(self) -> Server:
        """Start listening; StartError says why if it can't."""
        start_needs(not self._listener, "this server is running already; stop() it first")
        portal = Portal(self.settings)
        try:
            self._listener = Listener(portal, self.settings.host, self.settings.port)
        except BaseException:
            portal.close()
            raise
        every = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}
        host = every.get(self.settings.host, self.settings.host)
        self.host, self.port = f"[{host}]" if ":" in host else host, self._listener.server_address[1]
        self.address = portal.address = f"{self._listener.scheme}://{self.host}:{self.port}"
        self.url = portal.browser_base()
        self.fhir_url, self.open_fhir_url = f"{self.url}/api/fhir", f"{self.url}/api/open-fhir"
        portal.log, self.portal = write_log, portal
        self._listener.accepting.start()
        return self

    def stop(self) -> None:
        """Stop; safe to call twice. Nothing is left: no thread, no socket, no file."""
        listener, self._listener = self._listener, None
        if listener:
            listener.stop()
            listener.server_close()
            self.portal.close()

    def __enter__(self) -> Server:  # noqa: PYI034 (Self is newer than Python 3.9)
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()


# ######################################################################## 27 HTTP

MAX_BODY = 1 << 20        # bytes of a request's body
_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) ([!-~]{1,65535}) HTTP/([0-9])\.([0-9])\r\n")
_ENDPOINT = re.compile(r"([A-Z]{1,20}) +(?i:https?://[^/?# ]*)?(/[!-~]*)")  # of a line that may be malformed
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?")
REASONS = {status.value: status.phrase for status in http.HTTPStatus}


class Listener(http.server.ThreadingHTTPServer):
    """The listening socket, and a thread for each connection."""
    request_queue_size = 1024     # clients that come together wait here; with the default of 5 most fail
    allow_reuse_address = sys.platform != "win32"  # there it would let two servers share a port
    idle_seconds, head_seconds, body_seconds, stop_seconds = 120.0, 20.0, 60.0, 2.0

    def __init__(self, portal: Portal, host: str, port: int):
        self.portal = portal
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        settings, self._context = portal.settings, None
        self.scheme = "https" if settings.certfile else "http"
        if settings.certfile:
            import ssl  # takes long to import, and few need it
            try:
                self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                self._context.load_cert_chain(str(settings.certfile), settings.keyfile)
            except (OSError, ssl.SSLError) as error:
                raise StartError(f"--certfile {settings.certfile}: {error}; give PEM files")
        self._threads_of_connections: set[threading.Thread] = set()
        self.accepting = threading.Thread(target=self.accept_until_stopped, daemon=True)
        self._wake, self._woken = socket.socketpair()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise StartError(f"can't listen on {host} port {port}: {error}; --port 0 takes any free one")
        self.socket.setblocking(False)  # a client that is gone before it is accepted holds nobody

    def server_bind(self) -> None:
        """Bind without HTTPServer's getfqdn, which may ask a name server and wait for seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def accept_until_stopped(self) -> None:
        """Accept connections. A byte on the wake socket ends it; serve_forever polls twice a second."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self.portal.stopping.is_set():
                selector.select()
                try:
                    self.process_request(*self.get_request())
                except OSError:  # stopped; or the client is gone again; or no file descriptor is left
                    self.portal.stopping.wait(0.01)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread. ThreadingMixIn's own are waited for without end, or not at all. What goes wrong
        outside of any request is logged before the client sees the end."""
        def live() -> None:
            connection = request
            try:
                if self._context:
                    connection = self._context.wrap_socket(
                        request, server_side=True, do_handshake_on_connect=False)
                self.finish_request(connection, client_address)
            except OSError:
                pass  # a client that went away
            except Exception as error:  # noqa: BLE001
                self.portal.log_bug("a connection", error)
            finally:
                connection.close()
                self._threads_of_connections.discard(thread)

        thread = threading.Thread(target=live, name="s4s connection", daemon=True)
        self._threads_of_connections.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads; those there are go on
            self._threads_of_connections.discard(thread)
            self.shutdown_request(request)

    def log_request(self, request: Request, status: int, seconds: float) -> None:
        """A line a request, of nothing that could be a secret: no query, no header, no body."""
        settings = self.portal.settings
        if settings.quiet:
            return
        path = _LOOKS_DRAWN.sub(REDACTED, request.path)
        # Where a resource was found (/api/fhir/[type]/[id]), this is its address. Else it may hold anything.
        if status >= 300 or request.method == "OPTIONS" or path.count("/") > 4:
            path = scrubbed(self.portal, path)
        taken, notes = f"{status} {seconds * 1000:.1f} ms", request.notes if settings.verbose else ()
        line = " ".join(filter(None, (request.method, path, taken, request.client_id, request.username)))
        self.portal.log(line, *(f"    {scrubbed(self.portal, note)}" for note in notes))

    def stop(self) -> None:
        """Stop accepting, let requests in flight finish, for 2 seconds at most, close everything."""
        self.portal.stopping.set()
        self._wake.send(b"x")
        self.accepting.join()
        self.portal.sockets.end(only_idle=True)  # and see Handler.wait_for_request
        threads, deadline = list(self._threads_of_connections), time.monotonic() + self.stop_seconds
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self.portal.sockets.end()
        for thread in threads:  # one second for all: there may be hundreds that no end wakes
            thread.join(max(0.0, deadline + 1 - time.monotonic()))

    def server_close(self) -> None:
        """Close the listening socket and the wake sockets; also called where it can't listen."""
        super().server_close()
        self._wake.close()
        self._woken.close()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. It reads requests strictly, with its own lean parser: that of http.server takes longer
    than all that the portal does."""
    server: Listener
    disable_nagle_algorithm = True  # or a second write could wait 40 ms for a delayed acknowledgement

    def handle(self) -> None:
        """Requests, one after the other, until somebody closes."""
        self.timed, self.close_connection = TimedSocket(self.connection), False
        self.lines = io.BufferedReader(self.timed, 16 << 10)
        self.server.portal.sockets.add(self.timed)
        try:
            if self.server.scheme == "https":
                self.allow(self.server.head_seconds)
                self.timed.handshake()
            while not self.close_connection and self.wait_for_request():
                self.handle_one_request()
        except BadRequest as error:
            self.refuse(error)
        except OSError:
            pass  # the client went away, or a test ordered a drop
        finally:
            self.server.portal.sockets.discard(self.timed)

    def allow(self, seconds: float) -> None:
        """Set the deadline of what is read or written next."""
        self.timed.deadline = time.monotonic() + seconds

    def wait_for_request(self) -> bool:
        """Whether one comes. Between two requests a connection may be stopped, and needs no words to end."""
        self.allow(self.server.idle_seconds)
        self.timed.idle = True
        try:
            return not self.server.portal.stopping.is_set() and bool(self.lines.peek(1))
        except BadRequest:  # idle for long
            return False
        finally:
            self.timed.idle = False

    def handle_one_request(self) -> None:
        """Read a request, answer it."""
        request = self.read_request()
        started = time.perf_counter()
        response = dispatch(self.server.portal, request)
        # First the log, so that whoever has the answer finds the story of it there.
        self.server.log_request(request, response.status, time.perf_counter() - started)
        self.send(request.method, response)
        if request.broken:
            self.linger()

    def read_request(self) -> Request:
        """The request that has begun to arrive. Where something is wrong with it, its endpoint answers in its
        own shape; BadRequest if it is not even known which that is."""
        self.allow(self.server.head_seconds)
        line = self.lines.readline(MAX_HEAD + 1)
        if line == b"\r\n":  # RFC 9112 section 2.2: one empty line before a request is forgiven
            line = self.lines.readline(MAX_HEAD + 1)
        request = None
        try:
            request = self.read_head(line)
            request.body = self.read_body(request)
        except BadRequest as error:
            endpoint = None if request else _ENDPOINT.match(line.decode("latin-1"))
            if endpoint:
                request = Request(endpoint[1], endpoint[2], {}, scheme=self.server.scheme)
            if not request:
                raise
            request.broken = PortalError("invalid_request", str(error), error.status)
            self.close_connection = True
        return request

    def read_head(self, line: bytes) -> Request:
        """The request of a request line and the headers that follow it."""
        match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
        if not match:
            if len(line) > MAX_HEAD:
                raise BadRequest(414, f"the request line is longer than {MAX_HEAD} bytes")
            raise BadRequest(400, "expected a request line such as GET / HTTP/1.1")
        method, target, major, minor = match.groups()
        if major != "1":
            raise BadRequest(505, "expected HTTP/1.1 or HTTP/1.0")
        headers = read_headers(self.lines, MAX_HEAD - len(line))
        self.close_connection = minor == "0" or "close" in headers.get("connection", "").lower()
        if minor == "0":
            headers.pop("expect", None)  # HTTP/1.0 has no interim answers (RFC 9110 section 10.1.1)
            headers.setdefault("host", urlsplit(self.server.portal.address).netloc)
        return Request(method, self.own_target(method, target, headers), headers, scheme=self.server.scheme)

    @staticmethod
    def own_target(method: str, target: str, headers: dict[str, str]) -> str:
        """The target as path and query. An absolute one's host counts, not the header's (RFC 9112, 3.2.2)."""
        absolute = target[0] != "/" and re.fullmatch(r"https?://([^/?#]*)/?(.*)", target, re.IGNORECASE)
        if absolute:
            headers["host"], target = absolute[1], "/" + absolute[2]
        elif target == "*" and method == "OPTIONS":
            target = "/"
        if target[0] != "/" or "#" in target:
            raise BadRequest(400, "expected a request target that starts with /")
        if not _HOST.fullmatch(headers.get("host", "")):
            raise BadRequest(400, "expected a Host header with a host, and a port or none")
        return target

    def read_body(self, request: Request) -> bytes:
        """The body, as its headers announce it."""
        if "content-length" not in request.headers and "transfer-encoding" not in request.headers:
            return b""

        def before() -> None:
            self.allow(self.server.body_seconds)
            if request.headers.get("expect", "").lower() == "100-continue":
                self.timed.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        loads = request.path == "/oauth/debug/load" and self.server.portal.settings.serves_debug
        return read_body(self.lines, request.headers, MAX_LOAD if loads else MAX_BODY, before)

    def send(self, method: str, response: Response) -> None:
        """Write a response."""
        self.close_connection = self.close_connection or self.server.portal.stopping.is_set()
        headers = [("Date", http_date(int(self.server.portal.clock.now()))), *response.headers]
        if response.status not in (204, 304):
            headers.append(("Content-Length", str(len(response.body))))
        if self.close_connection:
            headers.append(("Connection", "close"))
        lines = [f"{name}: {value}" for name, value in headers]
        if not "".join(lines).isprintable():
            # Whatever a value is made of, it stays one line: nobody adds headers of their own.
            lines = [re.sub(r"[\x00-\x1f\x7f]", "?", line) for line in lines]
        first = f"HTTP/1.1 {response.status} {REASONS.get(response.status, 'Status')}"
        head = "\r\n".join([first, *lines, "\r\n"]).encode("latin-1", "replace")
        body = b"" if method == "HEAD" else response.body
        self.allow(self.server.body_seconds)
        # To join a long body with its head takes longer than to write twice.
        for data in [head + body] if len(body) < 64 << 10 else [head, body]:
            self.timed.send(data)

    def refuse(self, error: BadRequest) -> None:
        """Answer what can't be told to be a request of any endpoint."""
        self.close_connection = True
        self.server.log_request(Request("-", "-", {}), error.status, 0.0)
        with contextlib.suppress(OSError, BadRequest):
            told = {"error": "invalid_request", "error_description": str(error)}
            self.send("", json_response(told, error.status, [NO_SNIFFING]))
            self.linger()

    def linger(self) -> None:
        """Let the client finish sending: where unread bytes are left, the answer is lost in a reset."""
        with contextlib.suppress(OSError, BadRequest):
            self.connection.shutdown(socket.SHUT_WR)
            self.allow(1)
            for _ in range(1024):
                if not self.lines.read1(64 << 10):
                    break


# ######################################################################## 28 command line

ENVIRONMENT = {"API_SERVER": "fhir_server", "BASE_URL": "base_url", "API_SERVER_NAME": "name",
               "ENABLE_UNSECURE_FHIR": "open_fhir"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the portal until SIGINT or SIGTERM. `argv` is the command line without the program's name.
    The exit status: 0, or 1 where it can't start. A bad option ends in argparse's SystemExit(2)."""
    parser, stop = build_parser(), threading.Event()
    chosen = vars(parser.parse_args(argv))
    try:
        Settings(**chosen)
    except StartError as error:
        parser.error(str(error))
    kinds = signal.SIGINT, signal.SIGTERM
    handlers = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    try:
        environment = settings_from_environment(chosen)
        server = Server(**{"port": OPTIONS["port"].default, "quiet": False, **environment, **chosen}).start()
        try:
            for kind in kinds:
                signal.signal(kind, lambda *_: stop.set())
            print(server.address, flush=True)
            threading.Thread(target=look_behind, args=(server.portal,), daemon=True).start()
            used = [variable for variable, name in ENVIRONMENT.items() if name in environment]
            write_log(*banner(server, used))
            while not stop.wait(0.5):  # with a timeout, or Windows would not hear Ctrl-C
                pass
        finally:
            server.stop()
    except StartError as error:
        print(f"s4s_proxy.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # of default_int_handler: a signal while it starts, which may take long
        pass
    finally:
        for kind, handler in zip(kinds, handlers):
            signal.signal(kind, handler)
    return 0


def look_behind(portal: Portal) -> None:
    """Ask the FHIR server for its version, which warns where there is none. Nobody waits for it."""
    with contextlib.suppress(PortalError):
        _ = portal.records.version


def build_parser() -> argparse.ArgumentParser:
    """The command line's options: the settings, one each."""
    parser = argparse.ArgumentParser(
        prog="s4s_proxy.py", description="A SMART on FHIR patient portal for testing, with made-up patients.",
        epilog="The source is the manual: it is meant to be read from top to bottom, in a day.")
    for name, option in OPTIONS.items():
        kind = Settings.__annotations__[name]
        shown: Json = {"default": argparse.SUPPRESS, "help": option.text}
        if kind.startswith("bool"):
            shown["action"] = "store_true" if option.default is False else argparse.BooleanOptionalAction
        else:
            shown.update(metavar=option.placeholder, type={"int": int, "float": float}.get(kind, str))
            if kind.startswith("list"):
                shown["action"] = "append"
            elif option.default is not None:
                shown["help"] += f" (default: {option.default})"
        parser.add_argument("--" + name.replace("_", "-"), **shown)
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def settings_from_environment(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The original's environment variables, where the option is not given."""
    settings: dict[str, Any] = {}
    for variable, name in ENVIRONMENT.items():
        text = os.environ.get(variable, "")
        if text and name not in chosen:
            settings[name] = {"true": True, "false": False}.get(text.lower()) if name == "open_fhir" else text
            try:
                start_needs(settings[name] is not None, "expected True or False")
                Settings(**{**chosen, name: settings[name]})
            except StartError as error:
                raise StartError(f"{variable}={text}: {error}")
    return settings


def banner(server: Server, from_environment: Iterable[str]) -> list[str]:
    """What a person who starts the server wants to know, in lines."""
    settings, url = server.settings, server.url
    names = ", ".join(user["username"] for user in some_users(server.portal))
    others = ", and every other patient's id" if server.portal.records.has_accounts else ""
    password = f"password {DEMO_PASSWORD} unless --fixtures says another"
    open_to_all = [f"{url}/api/open-fhir/ (every record)"] if settings.serves_open_fhir else []
    if settings.serves_debug:
        open_to_all.append(f"{url}/oauth/debug/ (tokens for anybody)")
    if not settings.pkce:
        open_to_all.append("the code of a public client, for whoever steals it (--no-pkce)")
    return [
        f"s4s_proxy.py {__version__}: {settings.name}. FOR TESTING ONLY, with made-up patients.",
        f"  start page   {url}/", f"  FHIR API     {url}/api/fhir",
        f"  accounts     {names}{others}; {password}",
        f"  open to all  {'; '.join(open_to_all) or 'nothing'}",
        *(f"  environment  {name} took effect" for name in from_environment),
        *(f"  data         {warning}" for warning in server.portal.records.warnings)]


if __name__ == "__main__":
    sys.exit(main())
