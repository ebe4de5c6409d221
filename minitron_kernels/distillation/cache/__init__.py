"""A teacher's outputs on disk, found by the tokens of their sequence: see writer, reader and teacher."""

from minitron_kernels.distillation.cache.fill import CacheRun, cache_teacher, teacher_spec
from minitron_kernels.distillation.cache.fingerprint import (
    head_fingerprint,
    model_fingerprint,
    tokenizer_hash,
)
from minitron_kernels.distillation.cache.reader import CacheSummary, TeacherCache, UncachedError
from minitron_kernels.distillation.cache.sequences import digest
from minitron_kernels.distillation.cache.spec import CacheSpec
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
