"""Labels shards in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from labeler.base.cores import usable_cores
from labeler.base.errors import LabelingError, TokenLabelError
from labeler.base.freed_memory import freed_memory_kept
from labeler.worker import LabelingJob, ShardLabeler, ShardResult, ShardTask

# Called with the number of finished images: after each batch in this process, after each shard on Ray; 0 at the start.
Advance = Callable[[int], None]


def run_in_process(tasks: list[ShardTask], job: LabelingJob, advance: Advance) -> Iterator[ShardResult]:
    """Labels shards one after the other in this process.

    Args:
        tasks: The shards.
        job: The run.
        advance: Called with the number of finished images.

    Yields:
        The result of each shard.

    Raises:
        LabelingError: A shard could not be labeled.
    """
    with freed_memory_kept(job.device == "cpu"):
        labeler = ShardLabeler(job, job.config.threads or usable_cores())
        advance(0)
        for task in tasks:
            try:
                yield labeler(task, advance)
            except TokenLabelError:
                raise
            except Exception as error:
                raise LabelingError(
                    f"shard {task.shard} (images {task.keys[0]!r} to {task.keys[-1]!r}) could not be labeled",
                    got=f"{type(error).__name__}: {error}",
                    remedy="Earlier shards are committed; the same command resumes.",
                ) from error
