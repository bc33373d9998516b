"""Tests of s4s_proxy.py, over real sockets. Run: python -m unittest"""
from __future__ import annotations

import unittest

import s4s_proxy as s4s


class PublishedVectors(unittest.TestCase):
    """Examples that the texts themselves give."""

    def test_the_s256_challenge_of_rfc_7636_appendix_b(self) -> None:
        self.assertEqual(s4s.s256_challenge("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"),
                         "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM")


if __name__ == "__main__":
    unittest.main()
