"""Deciding whether a candidate replaces the champion, and doing it: gate, register, ledger, promote, rollback."""
