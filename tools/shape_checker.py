"""The run-time checker of annotations in the first pass of `tools/test`.

beartype, with an int where a float is asked for, as PEP 484 and every type checker allow.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
