"""Checkpoints that are either complete or absent.

::

    out/checkpoints/step-00001200/      gets this name only once everything in it is on the disk
        meta.json                       format, recipe, classes, step, sums; size and SHA-256 of every other file
        model.safetensors               the net under torchvision's names     } layout "full"
        ema.safetensors                 averaged weights, if the run has them }
        state.pt                        optimizer, gradient scaler, random states
        shards/                         layout "sharded": model, optimizer and averaged weights
                                        (torch.distributed.checkpoint, one file per process)

A checkpoint is written into a hidden folder, each file is flushed to the disk, and then the folder is renamed. A
process that is killed at any instruction, or a disk that fills up, leaves the previous checkpoints as they were.

Reading checks every file against its digest. A damaged checkpoint is named, and the newest good one before it is used.
Reading runs no code from a file and reads no file outside the folder.

A run removes only what it wrote itself: folders with exactly these names and its own name in their sealed
``meta.json``. A checkpoint that is in the way is renamed, and the run says so.

``meta`` checks ``meta.json``, ``folder`` finds, keeps and removes checkpoints, ``state`` saves and restores the net and
its optimizer, ``shards`` reads and writes the sharded layout.
"""

from .folder import (
    ResumePoint,
    best_of,
    bests,
    check_own,
    folder_of,
    found,
    keep_best,
    resume_point,
    set_aside,
    surplus,
)
from .meta import FOLDER, META, SHARDS, Damaged, digest_of, read_meta, seal, step_of
from .state import TrainingState, export_weights, restore_checkpoint, save_checkpoint

__all__ = [
    "FOLDER",
    "META",
    "SHARDS",
    "Damaged",
    "ResumePoint",
    "TrainingState",
    "best_of",
    "bests",
    "check_own",
    "digest_of",
    "export_weights",
    "folder_of",
    "found",
    "keep_best",
    "read_meta",
    "restore_checkpoint",
    "resume_point",
    "save_checkpoint",
    "seal",
    "set_aside",
    "step_of",
    "surplus",
]
