"""A chat endpoint on localhost that misbehaves as it is told, and the tiny language model that answers there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

SPECIAL = ("<s>", "<user>", "<assistant>", "<end>", "<think>", "</think>")
WORDS = (" Oslo", " five", " Rome", "Rome", ":R", "om", " gold", "gold", "fish", "the ", "\n", "yes", "no")
#: Ids: special tokens, words, 256 bytes, 64 kinds of image tokens.
VOCABULARY = len(SPECIAL) + len(WORDS) + 256 + 64


@dataclasses.dataclass(frozen=True)
class Token:
    id: int
    text: str
    start: int
    end: int


class TinyChat:
    """A deterministic language model with a tokenizer, and chat templates that are easy or hard to score under.

    Args:
        style: "turns": special tokens around texts. "spaced": a blank before an answer, which merges with it.
            "merging": an answer merges with the colon before it. "thinking": the generation prompt holds what an
            answered turn doesn't. "closing": an answer that is to be continued is ended all the same.
        boost: added to the logits of the tokens with these texts.
    """

    def __init__(self, style: str = "turns", boost: dict[str, float] | None = None) -> None:
        self.style = style
        self.boost = np.zeros(VOCABULARY)
        for text, value in (boost or {}).items():
            self.boost[self.tokenize([text])[0].id] = value

    def tokenize(self, parts: list[str]) -> list[Token]:
        """Greedy, longest word first; other characters by their UTF-8 bytes; "image:…" parts as a few tokens."""
        tokens, at = [], 0
        for part in parts:
            if part.startswith("image:"):
                digest = zlib.crc32(part.encode())
                base = len(SPECIAL) + len(WORDS) + 256
                tokens += [Token(base + (digest >> 6 * i) % 64, "<image>", at, at) for i in range(2 + digest % 3)]
                continue
            here = 0
            while here < len(part):
                known = [p for p in (*SPECIAL, *WORDS) if part.startswith(p, here)]
                piece = max(known, key=len) if known else part[here]
                span = (at + here, at + here + len(piece))
                if known:
                    tokens.append(Token((*SPECIAL, *WORDS).index(piece), piece, *span))
                else:
                    raw = piece.encode()
                    text = piece if len(raw) == 1 else "\ufffd"
                    tokens += [Token(len(SPECIAL) + len(WORDS) + byte, text, *span) for byte in raw]
                here += len(piece)
            at += len(part)
        return tokens

    def render(self, messages: list[dict[str, Any]], *, generate: bool, open_end: bool) -> list[str]:
        """The conversation as text parts and "image:…" parts."""
        opening, closing = {
            "turns": ({"system": "<s>", "user": "<user>", "assistant": "<assistant>"}, "<end>"),
            "thinking": ({"system": "<s>", "user": "<user>", "assistant": "<assistant>"}, "<end>"),
            "closing": ({"system": "<s>", "user": "<user>", "assistant": "<assistant>"}, "<end>"),
            "spaced": ({"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}, "\n"),
            "merging": ({"system": "", "user": "Q:", "assistant": "A:"}, "\n"),
        }[self.style]
        parts = ["<s>"]
        for i, message in enumerate(messages):
            parts.append(opening[message["role"]])
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    parts.append(part["text"])
                else:
                    parts.append("image:" + part["image_url"]["url"])
            if not open_end or i + 1 < len(messages) or self.style == "closing":
                parts.append(closing)
        if generate:
            parts.append(opening["assistant"].rstrip() + ("<think></think>" if self.style == "thinking" else ""))
        merged: list[str] = []
        for part in parts:  # a text is tokenized whole, up to the next image
            if merged and not part.startswith("image:") and not merged[-1].startswith("image:"):
                merged[-1] += part
            else:
                merged.append(part)
        return merged

    def distribution(self, before: list[int]) -> np.ndarray:
        """Log-probabilities of the next token."""
        state = (sum((i + 1) * token for i, token in enumerate(before)) * 31 + len(before)) % 997
        logits = 3 * np.sin(0.7 * (state + 1) * np.arange(1, VOCABULARY + 1)) + self.boost
        return logits - np.logaddexp.reduce(logits)

    def logprobs(self, tokens: list[Token]) -> list[float]:
        """Of each token but the first, given those before."""
        ids = [token.id for token in tokens]
        return [float(self.distribution(ids[:i])[ids[i]]) for i in range(1, len(ids))]

    def answer_logprobs(self, messages: list[dict[str, Any]], answer: str) -> list[float]:
        """The oracle: log-probabilities of the tokens that hold a character of the answer, found by their offsets.

        Or of the blank before it, where the model has to write that.
        """
        answered = [*messages, {"role": "assistant", "content": answer}]
        parts = self.render(answered, generate=False, open_end=self.style != "closing")
        tokens = self.tokenize(parts)
        end = sum(len(part) for part in parts if not part.startswith("image:"))
        start = end - len(answer) - (self.style == "spaced")
        every = [0.0, *self.logprobs(tokens)]
        return [p for p, token in zip(every, tokens, strict=True) if token.end > start and token.start < end]

    def reply(self, body: dict[str, Any], logprobs: str) -> dict[str, Any]:
        """What a server answers; `logprobs` says which fields it knows: "vllm", "openai" or "none"."""
        generate = body.get("add_generation_prompt", True)
        open_end = body.get("continue_final_message", False)
        known = logprobs == "vllm"
        parts = self.render(body["messages"], generate=generate or not known, open_end=open_end and known)
        tokens = self.tokenize(parts)
        last = [part for part in parts if not part.startswith("image:")][-1]
        text = f" answer {zlib.crc32(''.join(parts).encode()) % 1000} to {len(last)} "
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "stop"
        reply: dict[str, Any] = {"object": "chat.completion", "choices": [choice]}
        reply["usage"] = {"prompt_tokens": len(tokens), "completion_tokens": 5, "total_tokens": len(tokens) + 5}
        if known and body.get("prompt_logprobs") is not None:
            values = self.logprobs(tokens)
            reply["prompt_logprobs"] = [
                None,
                *(
                    {str(token.id): {"logprob": value, "rank": 1, "decoded_token": token.text}}
                    for token, value in zip(tokens[1:], values, strict=True)
                ),
            ]
        if logprobs in ("vllm", "openai") and body.get("logprobs"):
            values = self.distribution([token.id for token in tokens])
            order = np.argsort(-values)[: body["top_logprobs"]]
            texts = self.texts()
            top = [{"token": texts[i], "logprob": float(values[i]), "bytes": None} for i in order]
            choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
        return reply

    def texts(self) -> list[str]:
        """What each id decodes to."""
        single = [chr(i) if i < 128 else "\ufffd" for i in range(256)]
        return [*SPECIAL, *WORDS, *single, *["<image>"] * 64]


@dataclasses.dataclass
class Reply:
    """What the server does with one request.

    Attributes:
        status, body, headers: of the answer; a dict is sent as JSON; None: the model's own answer.
        drop: close the connection: "before" or in the "middle" of the answer.
        hold: wait for this first.
        write: answers instead of all this; it is given the handler.
    """

    status: int = 200
    body: Any = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    drop: str | None = None
    hold: threading.Event | None = None
    write: Callable[[BaseHTTPRequestHandler], None] | None = None


class FaultServer:
    """Answers chat completions, or does what its script and its rule say.

    Attributes:
        url: of its API.
        script: replies to the first requests, in order of arrival.
        rule: what is done with the others: a function of the request's body, None for the model's own answer.
        bodies, headers: of every request.
        most: requests that were there at once, at most.
        barrier: if set, every request waits for the others there.
    """

    def __init__(self, chat: Any = None, logprobs: str = "none") -> None:
        self.chat = chat or TinyChat()
        self.logprobs = logprobs
        self.script: list[Reply] = []
        self.rule: Callable[[dict[str, Any]], Reply | None] = lambda body: None
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        self.barrier: threading.Barrier | None = None
        self.lock = threading.Lock()
        self.url = ""

    def asked(self) -> list[str]:
        """The last text of every conversation that was sent."""
        texts = []
        for body in self.bodies:
            content = body["messages"][-1]["content"]
            texts.append(content if isinstance(content, str) else content[-1].get("text", ""))
        return texts

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            self.bodies.append(body)
            self.headers.append(dict(handler.headers))
            self.paths.append(handler.path)
            self.now += 1
            self.most = max(self.most, self.now)
            reply = self.script.pop(0) if self.script else (self.rule(body) or Reply())
        if self.barrier is not None:
            self.barrier.wait(10)
        if reply.hold is not None:
            reply.hold.wait(10)
        if reply.write is not None:
            with self.lock:
                self.now -= 1
            handler.close_connection = True
            with contextlib.suppress(OSError):
                reply.write(handler)
            return
        content = self.chat.reply(body, self.logprobs) if reply.body is None else reply.body
        data = (content if isinstance(content, str) else json.dumps(content)).encode()
        with self.lock:
            self.now -= 1
        if reply.drop == "before":
            handler.close_connection = True
            return
        handler.send_response(reply.status)
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if reply.drop == "middle":
            handler.close_connection = True
            data = data[: len(data) // 2]
        with contextlib.suppress(OSError):  # the client may be gone
            handler.wfile.write(data)


@contextlib.contextmanager
def serve(chat: Any = None, *, logprobs: str = "none") -> Iterator[FaultServer]:
    """A running `FaultServer` on a free port."""
    state = FaultServer(chat, logprobs)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Headers and body leave in one packet; in two, the second waits for an acknowledgement.
        wbufsize = -1

        def do_POST(self) -> None:
            state.handle(self)

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *args: Any) -> None:
            pass  # a client that gave up

    server = Server(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
