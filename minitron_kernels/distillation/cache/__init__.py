"""A teacher's outputs on disk, found by the tokens of their sequence: see writer, reader and teacher."""

from typing import TYPE_CHECKING

from minitron_kernels._lazy import attach

if TYPE_CHECKING:
    from minitron_kernels.distillation.cache.fill import CacheRun, cache_teacher, teacher_spec
    from minitron_kernels.distillation.cache.fingerprint import (
        head_fingerprint,
        model_fingerprint,
        tokenizer_hash,
    )
    from minitron_kernels.distillation.cache.reader import TeacherCache, UncachedError
    from minitron_kernels.distillation.cache.sequences import digest
    from minitron_kernels.distillation.cache.spec import CacheSpec
    from minitron_kernels.distillation.cache.summary import CacheSummary
    from minitron_kernels.distillation.cache.teacher import CachedTeacher
    from minitron_kernels.distillation.cache.writer import TeacherCacheWriter

__all__ = [
    "CacheRun",
    "CacheSpec",
    "CacheSummary",
    "CachedTeacher",
    "TeacherCache",
    "TeacherCacheWriter",
    "UncachedError",
    "cache_teacher",
    "digest",
    "head_fingerprint",
    "model_fingerprint",
    "teacher_spec",
    "tokenizer_hash",
]
# where they are
_HOMES = {
    "CacheRun": "minitron_kernels.distillation.cache.fill",
    "CacheSpec": "minitron_kernels.distillation.cache.spec",
    "CacheSummary": "minitron_kernels.distillation.cache.summary",
    "CachedTeacher": "minitron_kernels.distillation.cache.teacher",
    "TeacherCache": "minitron_kernels.distillation.cache.reader",
    "TeacherCacheWriter": "minitron_kernels.distillation.cache.writer",
    "UncachedError": "minitron_kernels.distillation.cache.reader",
    "cache_teacher": "minitron_kernels.distillation.cache.fill",
    "digest": "minitron_kernels.distillation.cache.sequences",
    "head_fingerprint": "minitron_kernels.distillation.cache.fingerprint",
    "model_fingerprint": "minitron_kernels.distillation.cache.fingerprint",
    "teacher_spec": "minitron_kernels.distillation.cache.fill",
    "tokenizer_hash": "minitron_kernels.distillation.cache.fingerprint",
}

if not TYPE_CHECKING:  # else every name would be known to a type checker
    __getattr__, __dir__ = attach(__name__, _HOMES)
