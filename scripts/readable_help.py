"""Help of the scripts: descriptions as they are written, and defaults as they would be typed."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Appends the default of every option that has one; several values are joined by commas."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default, text = action.default, action.help
        if not action.option_strings or default in (None, False, argparse.SUPPRESS, "", (), []):
            return text
        several = isinstance(default, tuple | list)
        typed = ",".join(map(str, default)) if several else str(default)
        return f"{text} (default: {typed.replace('%', '%%')})"
