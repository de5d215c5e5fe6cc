"""machinery/remote.py: servers that speak the protocol, and servers that do not."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from machinery import remote
from machinery.errors import BadInput
from machinery.passages import Passage
from machinery.remote import RemoteRetriever


@pytest.fixture
def server():
    """A server with the answers that a test sets: (status, body), the raw pieces of a
    response, or a function that makes one of these from the request. The last one is
    given again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            server.requests.append(request)
            answer = server.answers[0]
            if len(server.answers) > 1:
                server.answers.pop(0)
            if callable(answer):
                answer = answer(request)
            with contextlib.suppress(OSError):  # the client may have given up
                self.send(answer)

        def send(self, answer):
            if isinstance(answer, tuple):
                status, body = answer
                if not isinstance(body, bytes):
                    body = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                answer = [body]
            for piece in answer:
                self.wfile.write(piece)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests = []
    server.answers = [search_r1]
    server.url = f"http://127.0.0.1:{server.server_port}/retrieve"
    # shutdown() waits for the next poll, so there are many.
    often = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=often, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def search_r1(request):
    """What Search-R1's server answers."""
    result = []
    for query in request["queries"]:
        hits = []
        for n in range(request["topk"]):
            document = {"id": str(n), "contents": f'"About {query}"\ntext {n}'}
            hits.append({"document": document, "score": 1.0 / (n + 1)})
        result.append(hits)
    return 200, {"result": result}


def test_the_remote_retriever_speaks_search_r1s_protocol(server):
    retriever = RemoteRetriever(server.url)
    assert retriever.search(["a", "ö"], 2) == [
        [
            Passage("0", "About a", "text 0", 1.0),
            Passage("1", "About a", "text 1", 0.5),
        ],
        [
            Passage("0", "About ö", "text 0", 1.0),
            Passage("1", "About ö", "text 1", 0.5),
        ],
    ]
    request = {"queries": ["a", "ö"], "topk": 2, "return_scores": True}
    assert server.requests == [request]
    assert retriever.search([], 3) == []
    assert len(server.requests) == 1


def test_a_hit_may_lack_its_score_and_its_id_and_more_than_k_are_cut(server):
    hit = {"document": {"contents": "T\na b"}}
    scored = {"document": {"contents": "T\na b"}, "score": 2}
    server.answers = [(200, {"result": [[hit, scored, hit], []]})]
    passages = RemoteRetriever(server.url).search(["a", "b"], 2)
    assert passages == [
        [Passage("", "T", "a b", 0.0), Passage("", "T", "a b", 2.0)],
        [],
    ]


def test_what_may_pass_is_tried_again(server):
    server.answers = [(500, b"busy"), (429, b"many"), (503, b"busy"), search_r1]
    assert len(RemoteRetriever(server.url, pause=0.01).search(["a"], 1)[0]) == 1
    assert len(server.requests) == 4
    for tries, status in enumerate((500, 429), start=1):
        server.answers = [(status, b"busy")]
        message = f"no answer from {server.url} in 3 attempts .*{status}"
        with pytest.raises(BadInput, match=message):
            RemoteRetriever(server.url, retries=2, pause=0.01).search(["a"], 1)
        assert len(server.requests) == 4 + 3 * tries


def test_each_pause_is_twice_the_one_before(server, monkeypatch):
    server.answers = [(500, b"busy")]
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    with pytest.raises(BadInput, match="in 4 attempts"):
        RemoteRetriever(server.url, retries=3, pause=1.5).search(["a"], 1)
    assert pauses == [1.5, 3.0, 6.0]


def test_a_slow_server_times_out(server):
    def late(request):
        time.sleep(1)
        return search_r1(request)

    server.answers = [late]
    message = f"no answer from {server.url} in 2 attempts .*[Tt]ime"
    with pytest.raises(BadInput, match=message):
        RemoteRetriever(server.url, timeout=0.1, retries=1, pause=0.01).search(["a"], 1)


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"HTTP/1.0 200 OK\r\n", b"x: y\r\n"), (b"HTTP/1.0 200 OK\r\n\r\n", b"[")],
    ids=["headers", "body"],
)
def test_a_server_that_drips_times_out(server, head, piece):
    """Each piece comes soon enough for a socket's timeout, the whole far too late."""

    def drip(request):
        yield head
        for _ in range(80):
            time.sleep(0.1)
            yield piece

    server.answers = [drip]
    began = time.monotonic()
    message = f"no answer from {server.url} in 2 attempts .*[Tt]ime"
    with pytest.raises(BadInput, match=message):
        RemoteRetriever(server.url, timeout=0.5, retries=1, pause=0.01).search(["a"], 1)
    assert 1.0 <= time.monotonic() - began < 5.0
    assert len(server.requests) == 2


NO_FORM = "not answer in Search-R1's form"


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (404, b"no such page", "refuses the request .*404"),
        (200, b"<html>", NO_FORM),
        (200, b"[" * 10**5, NO_FORM),
        (200, b"\xff", NO_FORM),
        (200, {"error": "no"}, NO_FORM),
        (200, [], NO_FORM),
        (200, {"result": {"a": []}}, NO_FORM),
        (200, {"result": "a"}, NO_FORM),
        (200, {"result": [{"document": {"contents": "a"}}]}, NO_FORM),
        (200, {"result": [["a"]]}, NO_FORM),
        (200, {"result": [[{"score": 1}]]}, NO_FORM),
        (200, {"result": [[{"document": "a", "score": 1}]]}, NO_FORM),
        (200, {"result": [[{"document": {"contents": 3}, "score": 1}]]}, NO_FORM),
        (200, {"result": [[{"document": {"contents": "a"}, "score": None}]]}, NO_FORM),
        (200, {"result": [[{"document": {"contents": "a"}, "score": "b"}]]}, NO_FORM),
        (
            200,
            {"result": [[{"document": {"contents": "a"}, "score": 10**400}]]},
            NO_FORM,
        ),
        (200, {"result": []}, "0 lists for 1 queries"),
        (200, {"result": [[], []]}, "2 lists for 1 queries"),
    ],
)
def test_a_wrong_answer_is_not_tried_again(server, status, body, message):
    server.answers = [(status, body)]
    with pytest.raises(BadInput, match=message) as error:
        RemoteRetriever(server.url, pause=0.01).search(["a"], 1)
    assert server.url in str(error.value)
    assert len(server.requests) == 1
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"SSH-2.0\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n[",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
        b"HTTP/1.0 302 Away\r\nLocation: http://[\r\n\r\n",
        b"HTTP/1.0 302 Away\r\nLocation: http://127.0.0.1:99999/\r\n\r\n",
        b"HTTP/1.0 302 Away\r\nLocation: http://127.0.0.1:port/\r\n\r\n",
        b"HTTP/1.0 302 Away\r\nLocation: http://" + b"x" * 99 + b"/\r\n\r\n",
    ],
)
def test_what_is_no_answer_is_said_so(server, response):
    server.answers = [[response]]
    with pytest.raises(BadInput, match=f"no answer from {server.url} in 2 attempts"):
        RemoteRetriever(server.url, retries=1, pause=0.01).search(["a"], 1)


def test_no_server_at_all():
    message = "no answer from http://127.0.0.1:9/retrieve in 2 attempts .*refused"
    retriever = RemoteRetriever("http://127.0.0.1:9/retrieve", retries=1, pause=0.01)
    with pytest.raises(BadInput, match=message):
        retriever.search(["a"], 1)


@pytest.mark.parametrize("where", ["post", "to_passage"])
def test_a_bug_of_our_own_keeps_its_traceback(server, monkeypatch, where):
    """It does not blame the server, also if it happens in the thread that asks it."""

    def bug(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(remote, where, bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        RemoteRetriever(server.url, pause=0.01).search(["a"], 1)


def test_no_semaphore_is_needed_and_a_slow_server_does_not_delay_the_end(server):
    """multiprocessing.pool needs one, which a machine without /dev/shm cannot give. The
    thread that still reads from the server must not keep the process."""

    def drip(request):
        yield b"HTTP/1.0 200 OK\r\n\r\n"
        for _ in range(100):
            time.sleep(0.1)
            yield b"["

    server.answers = [search_r1, drip]
    code = (
        "import sys\n"
        "sys.modules['_multiprocessing'] = None\n"
        "from machinery.remote import RemoteRetriever\n"
        "retriever = RemoteRetriever(sys.argv[1], timeout=0.5, retries=0)\n"
        "print(len(retriever.search(['a'], 3)[0]), flush=True)\n"
        "retriever.search(['a'], 3)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, server.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "3\n"
    assert "in 1 attempts (TimeoutError" in done.stderr
    assert time.monotonic() - began < 8


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000/retrieve",
        "ftp://127.0.0.1/",
        "http://",
        "http:///retrieve",
        "",
        "http://host/with a space",
        "http://host/é",
        "http://host:port/",
        "http://host/\n",
        "http://me:secret@host/",
    ],
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(
        BadInput, match="a retriever's URL is http:// or https"
    ) as error:
        RemoteRetriever(url)
    assert "secret" not in str(error.value)  # it would stand in a log


@pytest.mark.parametrize(
    "url", ["http://[::1]:80/a?b=c", "https://a-b.example.org.", "http://h:1"]
)
def test_what_is_a_url_is_not_refused(url):
    assert RemoteRetriever(url).url == url


def test_the_proxies_of_the_environment_are_not_used(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert RemoteRetriever(server.url, retries=0).search(["a"], 1)[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed_with_the_whole_request(server, status):
    head = f"HTTP/1.0 {status} Elsewhere\r\nLocation: /elsewhere\r\n\r\n"
    server.answers = [[head.encode()], search_r1]
    passages = RemoteRetriever(server.url, retries=0).search(["a"], 1)[0]
    assert passages[0].title == "About a"
    request = {"queries": ["a"], "topk": 1, "return_scores": True}
    assert server.requests == [request, request]
