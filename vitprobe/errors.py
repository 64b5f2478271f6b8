"""The errors that are the user's to mend: each message is one line that says what came, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave (a name, a file, an option). The command line prints it and exits with 2.

    Example:
        >>> from vitprobe import load_model
        >>> try:
        ...     load_model("mae_vit_bb")
        ... except UserError as error:
        ...     print(str(error).partition(":")[0])
        unknown model 'mae_vit_bb'
    """


class AttentionNotSeenError(UserError):
    """The model computes its attention where a capture cannot see it; names the model and the module."""


# How torch says that memory ran out, on a GPU and on the CPU.
OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory"
