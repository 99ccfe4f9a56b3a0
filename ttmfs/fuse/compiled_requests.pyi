from ..recovery.state import State
from .metrics import Metrics
from .page_requests import PageRequests

class CompiledRequests:
    def __init__(
        self, connection: int, message: memoryview, state: State, handlers: PageRequests, metrics: Metrics
    ) -> None: ...
    def answer_plain(self) -> int | None: ...
    def close(self) -> None: ...
