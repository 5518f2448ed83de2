"""`python -m heed_runtime.testing VERB ...`: the example app."""

from heed_runtime.testing import APP

if __name__ == "__main__":
    APP.main()
