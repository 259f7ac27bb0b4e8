"""``python -m amici_eval`` is ``amici-eval``."""

from amici_eval.cli.commands import main

if __name__ == "__main__":
    main()
