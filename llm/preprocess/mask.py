"""Mask personal data in texts: mail addresses, phone numbers, card numbers and IBANs become `<mail>` and so on.

Numbers of cards and accounts are masked only if their check digits are right.
"""

from __future__ import annotations

import re

MAIL = re.compile(r"\b[\w.+-]+@(?:[\w-]+\.)+[^\W\d_]{2,}\b")
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")
PHONE = re.compile(
    r"(?<![\w.,/-])(?:(?:\+|00)[1-9]|\(0|0[1-9])\d*(?:[ ()/.-]{0,3}\d){5,13}(?![\w-])"  # +49 30 123456, (030) 123456
    r"|(?<![\w.-])(?:\(\d{3}\) ?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![\w-])"  # 555-123-4567
)
DATE = re.compile(r"(?:\d{1,2}[./-]){2}(?:\d{4}|\d{2})\b|\d{4}-\d\d-\d\d")


def mask(text: str, kind: str) -> str:
    """Return the text with all data of a kind (mail, phone, card, iban) replaced by the kind's name."""
    if kind == "mail":
        return MAIL.sub("<mail>", text)
    if kind == "card":
        return CARD.sub(lambda match: "<card>" if is_card(match[0]) else match[0], text)
    if kind == "iban":
        return IBAN.sub(_mask_iban, text)
    return PHONE.sub(lambda match: match[0] if DATE.match(match[0]) else "<phone>", text)


def is_card(number: str) -> bool:
    """Check Luhn's digit (ISO/IEC 7812)."""
    digits = [int(digit) for digit in re.sub(r"\D", "", number)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def is_iban(number: str) -> bool:
    """Check the two digits of ISO 13616."""
    plain = number.replace(" ", "")
    return 15 <= len(plain) <= 34 and int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def _mask_iban(match: re.Match[str]) -> str:
    """Mask the longest beginning that is an IBAN: words in capitals may follow it."""
    found = match[0]
    for end in range(len(found), 14, -1):
        if found[end : end + 1] in ("", " ") and is_iban(found[:end]):
            return "<iban>" + found[end:]
    return found
