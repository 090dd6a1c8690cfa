"""An application of Ray Serve on the loopback, with a Redis, and one engine that says what its replicas should."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
from pages import typed
from services import free_port, redis_server
from transformers import AutoModelForCausalLM, AutoTokenizer

from redknot_hf import HeadPlan, SegmentStore
from redknot_hf.serving import Engine, Sampling

TINY = Path(__file__).parents[1] / "evals" / "tiny"
SIZES = {"memory": "64MiB", "max_len": 1024, "max_batch": 4}
LONG = 200  # tokens of a prompt from which on it is read apart


class Replicas:
    """An application that runs, and what its replicas tell."""

    def __init__(self, url, redis, home):
        self.url, self.redis, self.home = url, redis, home

    def ask(self, path="completions", **body):
        answer = httpx.post(f"{self.url}/v1/{path}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def tokens(self, **body):
        """Each answer's tokens, which need not be ended by the model."""
        choices = self.ask(**body, ignore_eos=True, logprobs=0)["choices"]
        return [choice["logprobs"]["tokens"] for choice in choices]

    def get(self, path):
        return httpx.get(f"{self.url}{path}", timeout=30)

    def store(self, *documents):
        return [one["id"] for one in self.ask("segments", input=[*documents])["data"]]

    def in_redis(self, document):
        """Stores a document; its address, if it is in Redis then."""
        (address,) = self.store(document)
        return address if self.server.exists(f"redknot:segment:{address}") else None

    def alter(self, address):
        """Changes a bit of what Redis has of a document."""
        name = next(key for key in self.server.scan_iter(f"*{address}*:0"))
        value = bytearray(self.server.get(name))
        value[len(value) // 2] ^= 1
        self.server.set(name, bytes(value))

    @property
    def server(self):
        import redis

        return redis.Redis.from_url(self.redis.url)

    def told(self, only=""):
        """What each replica that answers says of itself now, by its name; or one of them, whatever others do."""
        import ray

        found = {}
        for one in ray.util.list_named_actors(all_namespaces=True):
            if "#answer#" in one["name"] and one["name"].endswith(only):
                actor = ray.get_actor(one["name"], namespace=one["namespace"])
                try:
                    found[one["name"]] = ray.get(actor.record_routing_stats.remote(), timeout=20)
                except ray.exceptions.RayError:  # it goes, or is not there yet
                    continue
        return {name: stats for name, stats in found.items() if stats}

    def count(self, name, tier=None):
        """A store's count, of all replicas together."""
        stores = [stats["load"]["store"] for stats in self.told().values()]
        return sum(store[name] if tier is None else store[name].get(tier, 0) for store in stores)

    def holders(self, address):
        return [name for name, stats in self.told().items() if address[:16] in stats["segments"]]

    def metric(self, name):
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@contextmanager
def running(folder):
    """Two replicas that answer, one that reads and a door, over one Redis; none of their processes is left."""
    ray = pytest.importorskip("ray", reason="ray is missing: pip install redknot-hf[ray]")
    serve = pytest.importorskip("ray.serve", reason="ray has no serve: pip install redknot-hf[ray]")
    from ray.serve.scripts import convert_args_to_dict, import_attr

    port = free_port()
    with redis_server(folder) as redis, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.3")
        patch.setenv("RAY_AUTH_TOKEN", "t" * 32)  # else Ray writes one to the home folder
        patch.delenv("RAY_AUTH_MODE", raising=False)  # which Ray sets
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        home = tempfile.mkdtemp(prefix="rk")  # sockets are in it, whose paths are short
        quiet = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 80 << 20}
        try:
            ray.init(address="local", num_cpus=1, _temp_dir=home, **quiet)
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            _, _, application, *arguments = typed("serve run")
            said = convert_args_to_dict(arguments)
            said |= {"model": str(TINY), "plan": str(TINY / "plan.json"), "store": redis.url}
            sizes = {"dtype": "float32", "name": "tiny", **SIZES, "prefill_from": LONG, "most": 3, "look": 0.5}
            serve.run(import_attr(application)({**said, **sizes, "cpus": 0.1}), name="redknot")
            yield Replicas(f"http://127.0.0.1:{port}", redis, Path(home))
        finally:
            if ray.is_initialized():
                serve.shutdown()
                ray.shutdown()
            ours = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
            left = psutil.wait_procs([child for child in ours if child.pid != redis.process.pid], 20)[1]
            for process in left:
                process.kill()
            shutil.rmtree(home, ignore_errors=True)
            assert not left


class Single:
    """One engine in this process, for what replicas should say."""

    def __init__(self):
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32", attn_implementation="redknot").eval()
        plan = HeadPlan.load(TINY / "plan.json")
        self.engine = Engine(model, plan, store=SegmentStore(model, plan), **SIZES)
        self.tokenizer = AutoTokenizer.from_pretrained(TINY)
        self.opening = self.tokenizer("")["input_ids"]

    def tokens(self, prompt, new, documents=(), **options):
        """Tokens behind documents and a prompt."""
        store = self.engine.documents.store
        refs = [store.add(one, self.opening or None) for one in documents]
        if refs and self.opening:
            refs.insert(0, store.add(self.opening))
        boundary = {"boundary": [0] * (len(refs) - len(documents)) + [0.1] * len(documents)} if refs else {}
        sampling = Sampling(max_new_tokens=new, ignore_eos=True, **options)
        request = self.engine.submit(prompt, sampling, segments=refs, **boundary)
        while not request.state.ended:
            self.engine.step()
        return [self.tokenizer.decode([token]) for token in request.result()]
