"""A random walk over caches of mixed storages: forks, crops, beams, compression, in any order, with checks."""

import copy
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from cold_account import HEADS, LAYERS, LONGEST, PAGE, Account, check_pages

from redknot_hf import HeadPlan, HeadSpec

WINDOWS = (1, 3, 9, 20, 40)


class Walk:
    """Some caches, and what happens to them."""

    def __init__(self, seed):
        self.random = np.random.default_rng(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.accounts = [self.fresh()]
        self.done = Counter()
        self.cold = 0

    def fresh(self):
        reserved = LONGEST + 16 if self.random.random() < 0.3 else None
        return Account(HeadPlan([[self.spec() for _ in range(HEADS)] for _ in range(LAYERS)]), self.size(), reserved)

    def size(self):
        return int(self.random.integers(1, 4))

    def spec(self):
        kind = self.random.choice(["model", "model", "int8", "int4", "local"])
        return self.local() if kind == "local" else HeadSpec(storage=str(kind))

    def local(self, window=WINDOWS[-1], sink=4):
        windows = [w for w in WINDOWS if w <= window]
        return HeadSpec(int(self.random.choice(windows)), int(self.random.integers(0, sink + 1)))

    def narrower(self, spec):
        if self.random.random() < 0.6:
            return spec
        if not spec.is_global:
            return self.local(spec.window, spec.sink)
        names = ["model", "int8", "int4"]
        choices = [*names[names.index(spec.storage) + 1 :], "local"]
        kind = str(self.random.choice(choices))
        return self.local() if kind == "local" else replace(spec, storage=kind)

    def turn(self):
        """Does something to one of the caches, and checks all of them."""
        at = int(self.random.integers(len(self.accounts)))
        names = ["decode"] * 5 + ["step"] * 4 + ["padded", "crop", "crop", "copy", "drop", "beams", "repeat", "select"]
        names += ["compress", "host", "spare", "reset"]
        name = str(self.random.choice(names))
        getattr(self, name)(self.accounts[at], at)
        self.done[name] += 1
        check_pages(self.accounts)
        self.cold += any(max(account.cold[0]) for account in self.accounts)
        if self.random.random() < 0.05:
            for account in self.accounts:
                if account.flags.shape[1]:
                    account.check_content()

    def read(self, account, tokens, real=None):
        if account.flags.shape[1] + tokens > LONGEST:
            return
        real = torch.ones(account.batch, tokens, dtype=torch.bool) if real is None else real
        account.step(tokens, real, self.torch, self.random.random() < 0.2)

    def decode(self, account, at):
        self.read(account, 1)

    def step(self, account, at):
        self.read(account, int(self.random.choice([2, 5, PAGE, PAGE + 1, 40, 70])))

    def padded(self, account, at):
        tokens = int(self.random.choice([1, 7, 30, 60]))
        real = torch.from_numpy(self.random.random((account.batch, tokens)) < self.random.random((account.batch, 1)))
        self.read(account, tokens, real)

    def crop(self, account, at):
        slots = account.flags.shape[1]
        if slots:
            account.cut(int(min(self.random.choice([1, 3, PAGE, 30, 50, slots]), slots)))

    def copy(self, account, at):
        if len(self.accounts) < 4:
            ways = [copy.deepcopy, lambda cache: cache.fork(), lambda cache: pickle.loads(pickle.dumps(cache))]
            self.accounts.append(account.like(self.random.choice(ways)(account.cache)))

    def drop(self, account, at):
        del self.accounts[at]
        if not self.accounts or self.random.random() < 0.5:
            self.accounts.append(self.fresh())

    def beams(self, account, at):
        if account.flags.shape[1]:
            index = self.random.integers(account.batch, size=account.batch)
            account.cache.reorder_cache(torch.from_numpy(index))
            account.select(index)

    def repeat(self, account, at):
        if account.flags.shape[1] and account.batch < 3:
            account.cache.batch_repeat_interleave(2)
            account.select(np.arange(account.batch).repeat(2))

    def select(self, account, at):
        if account.flags.shape[1]:
            index = self.random.permutation(account.batch)[: int(self.random.integers(1, account.batch + 1))]
            account.cache.batch_select_indices(torch.from_numpy(index))
            account.select(index)

    def compress(self, account, at):
        account.compress(HeadPlan([[self.narrower(spec) for spec in layer] for layer in account.plan]))

    def host(self, account, at):
        account.cache.offload()
        if self.random.random() < 0.5:
            account.cache.prefetch()

    def spare(self, account, at):
        """Gives spare memory back: then few pages are free."""
        account.cache.crop(0)
        for i, layer in enumerate(account.cache.layers):
            if account.reserved is None and layer.is_initialized:
                holders = [x for x in self.accounts if x.cache.layers[i].is_initialized]
                holders = [x for x in holders if x.cache.layers[i].storage.pool is layer.storage.pool]
                rows = max(x.batch * sum(s == HeadSpec() for s in x.plan[i]) for x in holders)
                assert layer.storage.pool.free <= rows

    def reset(self, account, at):
        if self.random.random() < 0.3:
            account.cache.reset()
            account.empty(self.size())
        if account.reserved is not None and account.cache.layers[0].is_initialized:  # what was reserved is so
            account.empty(account.cache.layers[0].batch_size)
            account.cache.reset()
