"""Extensions of MkDocs for `make docs`: the help of every command, pages from outside docs/, lists in docstrings."""
