"""The ways in which a command of linflab ends early."""


class SettingError(ValueError):
    """Wrong input: the message names the setting, its value and what would do. Raised before anything starts."""


class Busy(SettingError):
    """Another process is at it; once that has ended, the same can be asked for again."""


class TrainingError(RuntimeError):
    """Training went wrong: the message names the step at which it did and what to change."""


class WorkerDied(TrainingError):
    """A process or machine that trained is gone; from the last checkpoint, others can go on."""


class Interrupted(RuntimeError):
    """The user ended the work: the message says what is kept, and how to go on."""
