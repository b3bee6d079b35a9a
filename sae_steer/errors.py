"""What a user can do wrong, told in one line: what was given, what would have worked, what to do next."""


class SteerError(Exception):
    """A problem the user can mend; the command line prints it alone and exits with 1.

    What the message quotes from files is made harmless to a terminal.
    """

    def __str__(self) -> str:
        return visible(" ".join(map(str, self.args)))


class InputError(SteerError):
    """A text, pair, cache, dictionary or option that cannot be used as given."""


class NotNativeError(InputError):
    """A model that the native decoder does not compute, and that `transformers` may run itself."""


class MissingError(InputError, KeyError):
    """A record that lacks a key: it was written by another version, or by hand."""


class StaleError(SteerError):
    """A finished output made from other inputs or settings: refused, not overwritten, unless forced."""


class NotFiniteError(SteerError):
    """A NaN, an infinity, or a value beyond what the storage type holds."""


class NotDeliveredError(SteerError):
    """An edit that never reached the activations: an error, not a null result."""


def visible(text: str) -> str:
    """A text as a terminal may show it: what would move the cursor or change colours is spelled out."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
