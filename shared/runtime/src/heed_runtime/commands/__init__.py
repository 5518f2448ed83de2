"""The verbs, one file each: a dataclass `Options`, whose fields are the flags, and `run`.

A verb that takes SYSTEM derives its `Options` from `SystemOptions` and gets the settings as the
third argument of `run`. `run` returns a `Result`; it prints nothing itself.
"""
