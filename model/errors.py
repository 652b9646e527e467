"""The models' errors: what was got, what was expected, and what to do, in one line each."""


class ModelError(ValueError):
    """Bad usage of a model or of one of its operators: a wrong shape, name, type or file.

    `problem` says what is wrong; `got`, `expected` and `remedy` are added to the message where they are given.
    """

    def __init__(self, problem: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.problem, self.got, self.expected, self.remedy = problem, got, expected, remedy
        parts = [problem]
        if got is not None:
            parts.append(str(got) if ": got " in str(got) else f"got {got}")  # an error inside of another tells it once
        if expected is not None:
            parts.append(f"expected {expected}")
        text = ", ".join([": ".join(parts[:2]), *parts[2:]])
        super().__init__(f"{text}. {remedy}" if remedy else text)

    def __reduce__(self) -> tuple:
        # The default would call __init__ with the finished message alone and lose the parts on the way out of a worker.
        return _rebuild, (type(self), self.problem, self.got, self.expected, self.remedy)


class BackendError(ModelError, RuntimeError):
    """The backend that was asked for cannot run here or on these tensors."""


def _rebuild(cls: type[ModelError], problem: str, got: object, expected: object, remedy: str | None) -> ModelError:
    return cls(problem, got=got, expected=expected, remedy=remedy)
