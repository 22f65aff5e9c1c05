"""Which champion the way `warm` starts from: the one of now, or the one that an interrupted training began with."""

from collections.abc import Callable
from dataclasses import replace

from visionloop.promotion.ledger import read_history
from visionloop.training.job import Job

# How many promotions back an interrupted training is looked for.
LOOK_BACK = 20


def choose_start(job: Job, has_work: Callable[[Job], bool] | None = None) -> Job:
    """Return the job with its start; for other ways than `warm`, as it is.

    A training that was cut off goes on with the start it began with, also when another champion was promoted since:
    `has_work` says whether there is work under a job's input key (default: in the work folder).

    Raises:
        PromotionError: the ledger is damaged.
    """
    if job.params.train.way != "warm":
        return job
    has_work = has_work or has_work_here
    entries = read_history(job.store, job.params.name)[-LOOK_BACK:]
    digests = list(dict.fromkeys(entry.bundle for entry in reversed(entries)))
    jobs = [replace(job, start=digest) for digest in (*digests, None)]
    return next((each for each in jobs if has_work(each)), jobs[0])


def has_work_here(job: Job) -> bool:
    """Say whether this machine has an unfinished training of a job."""
    return (job.settings.work_dir("train") / job.make_key()[:16] / "run.json").is_file()
