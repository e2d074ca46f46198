"""A tool behind the http capability `team.announce`: it posts, but its first answer gets lost.

Only the standard library. `python3 examples/tool_server.py` listens on 127.0.0.1:9009; another port
may be given as the only argument. The first call is answered with 500 although the message was
posted; every later one is answered properly. A caller can not tell this 500 from one before the
work, which is why an `at_most_once` node is not called again by itself.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

posted: list[str] = []


class Tool(BaseHTTPRequestHandler):
    """One POST is one call of the capability."""

    def do_POST(self) -> None:
        """Read `{inputs: {text}, …}` and answer `{message_id}`."""
        call = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        posted.append(call["inputs"]["text"])
        message_id = f"m-{len(posted)}"
        sys.stdout.write(f"posted {message_id}: {posted[-1]}\n")
        sys.stdout.flush()
        if len(posted) == 1:
            self._answer(500, {"detail": "the answer was lost on the way"})
        else:
            self._answer(200, {"message_id": message_id})

    def _answer(self, status: int, content: dict[str, str]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what was posted is printed above."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9009
    ThreadingHTTPServer(("127.0.0.1", port), Tool).serve_forever()
