"""A client of a search server that speaks Search-R1's protocol."""

import json
import re
import threading
import time
import urllib.request
from concurrent.futures import Future
from http.client import HTTPException
from urllib.error import HTTPError

from machinery.errors import BadInput
from machinery.passages import Passage, to_passage

HOST = r"(\[[:.\w]+\]|[\w-]+(\.[\w-]+)*\.?)"
URL = re.compile(rf"https?://{HOST}(:\d+)?([/?][!-~]*)?", re.ASCII)

# What urllib raises where no answer comes: no connection, no time, or a status that
# says so; what is no HTTP; a redirect to what is no URL, or to a port that cannot be.
NO_ANSWER = (OSError, HTTPException, ValueError, OverflowError)


class RemoteRetriever:
    """A search server, in place of an index.

    It is sent {"queries", "topk", "return_scores"}. It answers with a list for each
    query: {"result": [[{"document": {"contents"}, "score"}, ...], ...]}.

    An attempt may take `timeout` seconds. Where no answer comes, or status 429 or 5xx,
    up to `retries` more follow, after pause, 2 pause, 4 pause, ... seconds. BadInput is
    raised if none helps, if the server refuses, and if its answer has another form.
    """

    def __init__(
        self, url: str, timeout: float = 60.0, retries: int = 3, pause: float = 1.0
    ):
        if not URL.fullmatch(url):
            raise BadInput(
                "a retriever's URL is http:// or https://, a host, a port and a path,"
                " in ASCII, without spaces and without a password"
            )
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.pause = pause

    def search(self, queries: list[str], k: int) -> list[list[Passage]]:
        """Like BM25.search, in one request. The server decides about scores of zero."""
        if not queries:
            return []
        body = {"queries": list(queries), "topk": k, "return_scores": True}
        answer = self._ask(json.dumps(body).encode())
        try:
            return to_results(json.loads(answer), len(queries), k)
        except (ValueError, RecursionError) as error:
            raise BadInput(
                f"{self.url} did not answer in Search-R1's form ({error})"
            ) from error

    def _ask(self, body: bytes) -> bytes:
        """Send one request, again if that may help, and return the answer."""
        for attempt in range(1, self.retries + 2):
            if attempt > 1:
                time.sleep(self.pause * 2 ** (attempt - 2))
            try:
                return within(self.timeout, post, self.url, body, self.timeout)
            except NO_ANSWER as error:
                if is_refusal(error):
                    raise BadInput(
                        f"{self.url} refuses the request ({error}): is the address "
                        "right?"
                    ) from error
                failure = error
        reason = f"{type(failure).__name__} {failure}"
        raise BadInput(
            f"no answer from {self.url} in {attempt} attempts ({reason})"
        ) from failure


def is_refusal(error: Exception) -> bool:
    """Whether the server would refuse the same request again.

    A status from 500 on is the server's own trouble, and 429 says: too many requests.
    """
    return isinstance(error, HTTPError) and error.code < 500 and error.code != 429


def to_results(answer, count: int, k: int) -> list[list[Passage]]:
    """The passages of a server's answer. ValueError says what is not in its form."""
    if not isinstance(answer, dict) or not isinstance(answer.get("result"), list):
        raise ValueError('no object with a list "result"')
    results = answer["result"]
    if len(results) != count:
        raise ValueError(f"{len(results)} lists for {count} queries")
    passages = []
    for hits in results:
        if not isinstance(hits, list):
            raise ValueError("a result is no list")
        passages.append([from_hit(hit) for hit in hits[:k]])
    return passages


def from_hit(hit) -> Passage:
    """The passage of one hit, {"document": {"contents"}, "score"}."""
    if not isinstance(hit, dict) or not isinstance(hit.get("document"), dict):
        raise ValueError('a hit is no object with a "document"')
    document = dict(hit["document"])
    document.setdefault("id", "")  # a server may leave it out
    try:
        score = float(hit.get("score", 0.0))
    except (TypeError, OverflowError) as error:
        raise ValueError("a score is no number") from error
    return to_passage(document, score)


def within(seconds: float, function, *arguments):
    """function(*arguments), or TimeoutError if it takes longer than this.

    A socket's own timeout is no such limit: it begins anew with every byte that comes.
    The function goes on in its thread, which does not keep the script from ending.
    """
    outcome = Future()

    def call():
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:  # of any kind: result() raises it again
            outcome.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return outcome.result(seconds)


def post(url: str, body: bytes, timeout: float) -> bytes:
    """The answer to one request. No byte of it may take longer than `timeout`."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with OPENER.open(request, timeout=timeout) as answer:
        return answer.read()


class Redirects(urllib.request.HTTPRedirectHandler):
    """Send the whole request to where the server says. Python's own drops its body."""

    def redirect_request(self, request, file, code, message, headers, url):
        return urllib.request.Request(url, request.data, request.headers)


# The proxies that are set in the shell are not used.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}), Redirects)
