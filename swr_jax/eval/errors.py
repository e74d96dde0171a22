"""What may go wrong with one task and leave the others as they are."""


class TaskError(ValueError):
    """A task cannot be set as asked: too little text, or a context too short for its prompt."""
