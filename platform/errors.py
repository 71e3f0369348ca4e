"""Exceptions that end a command early."""


class InputError(ValueError):
    """Invalid input; the message names the setting, its value and the fix. Raised before anything starts."""


class RunLockedError(InputError):
    """Lock held by another process; the command can be repeated once that process has ended."""


class TrainingError(RuntimeError):
    """Failure of training; the message names the step and what to change."""


class WorkerLostError(TrainingError):
    """Loss of a worker process or node; training can resume from the last checkpoint."""


class RunInterrupted(RuntimeError):
    """Interruption by the user; the message names what is kept and how to resume."""
