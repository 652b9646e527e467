"""Label images with a teacher network and store the labels: `label_images`, `LabelStore`, `ScoreMaps`.

Importing this package loads neither torch nor Ray; each name below is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from labeler.base.version import __version__

if TYPE_CHECKING:
    from labeler.base.errors import (
        InputError,
        IntegrityError,
        LabelingError,
        MismatchError,
        RemoteError,
        TeacherError,
        TokenLabelError,
    )
    from labeler.config import LabelerConfig
    from labeler.importers import import_token_label_files
    from labeler.run import LabelSummary, label_images
    from labeler.share.pull_store import pull_store
    from labeler.share.push_store import push_store
    from labeler.sources.image_source import ImageSource
    from labeler.sources.open_source import open_source
    from labeler.store.label_store import LabelStore
    from labeler.store.parts.merge_stores import merge_stores
    from labeler.store.score_maps import ScoreMaps
    from labeler.teacher.create_teacher import LoadedTeacher, Teacher, create_teacher
    from labeler.teacher.teacher_config import TeacherConfig

_HOMES = {
    "LabelerConfig": "config",
    "TeacherConfig": "teacher.teacher_config",
    "InputError": "base.errors",
    "IntegrityError": "base.errors",
    "LabelingError": "base.errors",
    "MismatchError": "base.errors",
    "RemoteError": "base.errors",
    "TeacherError": "base.errors",
    "TokenLabelError": "base.errors",
    "import_token_label_files": "importers",
    "ImageSource": "sources.image_source",
    "open_source": "sources.open_source",
    "LabelSummary": "run",
    "label_images": "run",
    "merge_stores": "store.parts.merge_stores",
    "pull_store": "share.pull_store",
    "push_store": "share.push_store",
    "ScoreMaps": "store.score_maps",
    "LabelStore": "store.label_store",
    "LoadedTeacher": "teacher.create_teacher",
    "Teacher": "teacher.create_teacher",
    "create_teacher": "teacher.create_teacher",
}

__all__ = [
    "ImageSource",
    "InputError",
    "IntegrityError",
    "LabelStore",
    "LabelSummary",
    "LabelerConfig",
    "LabelingError",
    "LoadedTeacher",
    "MismatchError",
    "RemoteError",
    "ScoreMaps",
    "Teacher",
    "TeacherConfig",
    "TeacherError",
    "TokenLabelError",
    "__version__",
    "create_teacher",
    "import_token_label_files",
    "label_images",
    "merge_stores",
    "open_source",
    "pull_store",
    "push_store",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'labeler' has no attribute {name!r}")
    return getattr(importlib.import_module(f"labeler.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
