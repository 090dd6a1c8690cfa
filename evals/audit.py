"""What ends a run: answers that are not those of the cache that was measured."""


class AuditError(RuntimeError):
    """Answers were reported that the method's own cache does not give."""
