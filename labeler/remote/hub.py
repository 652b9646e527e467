"""Files sent to the Hugging Face Hub in few commits: one for each file would soon meet the Hub's limit of commits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from labeler.base.errors import InputError
from labeler.remote.failures import Patience, retried

FILES, BYTES = 50, 4 << 30  # of one commit
ADDRESS = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.+))?")

Source = Path | bytes


def is_hub(url: str) -> bool:
    """Whether files at a URL are sent by commits."""
    return url.startswith("hf://") and not url.startswith("hf://buckets/")


def send_in_commits(
    url: str, files: Sequence[tuple[str, Source]], patience: Patience, sent: Callable[[int], None], message: str
) -> None:
    """Sends files to a repository of data sets, which is created, private, if there is none.

    Args:
        url: URL of the folder: hf://datasets/USER/NAME, optionally with @REVISION and a path.
        files: (name in the folder, file or content) of each.
        patience: How long to try.
        sent: Called with the bytes of each commit.
        message: The commits' message.

    Raises:
        InputError: The URL is not one of a repository of data sets, or there is no permission.
        RemoteError: The Hub does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    found = ADDRESS.fullmatch(url)
    if found is None:
        raise InputError(f"{url} cannot be written", expected="hf://datasets/USER/NAME")
    api: Any = HfApi()
    repo, folder = found["repo"], f"{found['path']}/" if found["path"] else ""
    retried(url, lambda: api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True), patience)
    for batch in _batches(files):

        def commit(batch: list[tuple[str, Source]] = batch) -> None:
            added = [
                CommitOperationAdd(folder + name, source if isinstance(source, bytes) else str(source))
                for name, source in batch
            ]
            api.create_commit(repo, added, commit_message=message, repo_type="dataset", revision=found["revision"])

        retried(url, commit, patience)
        sent(sum(size_of(source) for _, source in batch))


def size_of(source: Source) -> int:
    """Returns the bytes of a file or content."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _batches(files: Sequence[tuple[str, Source]]) -> Iterator[list[tuple[str, Source]]]:
    """Yields the files in groups of one commit each."""
    batch: list[tuple[str, Source]] = []
    size = 0
    for name, source in files:
        more = size_of(source)
        if batch and (len(batch) == FILES or size + more > BYTES):
            yield batch
            batch, size = [], 0
        batch.append((name, source))
        size += more
    if batch:
        yield batch
