"""Counting firings: densely by cell, of which there are few, and sparsely by task, of which there may be thousands.

A feature fires in few tasks: what is kept is one number for every feature and task in which it fires at all, so that
9,000 tasks and 65,536 features take the memory of their firings and not of 590 million counts.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_array

from sae_steer.sae.architectures import SparseDictionary

AT_ONCE = 2**20
"""Firings that are held before they are added up."""


class SparseTally:
    """How often each key was seen, for keys from a range far larger than those seen."""

    def __init__(self) -> None:
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int32)
        self._waiting: list[Int[np.ndarray, " seen"]] = []

    def add(self, keys: Int[np.ndarray, " seen"]) -> None:
        """Count these keys, each as often as it is among them."""
        self._waiting.append(keys)
        if sum(map(len, self._waiting)) > max(AT_ONCE, len(self._keys)):
            self._settle()

    def totals(self) -> tuple[Int[np.ndarray, " key"], Int[np.ndarray, " key"]]:
        """The keys seen, rising, and how often."""
        self._settle()
        return self._keys, self._counts

    def _settle(self) -> None:
        if not self._waiting:
            return
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting = []
        keys, counts = np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts.astype(np.int32)])
        order = np.argsort(keys, kind="stable")
        keys, counts = keys[order], counts[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        self._keys, self._counts = keys[first], np.add.reduceat(counts, first) if len(first) else counts


class FiringCounter:
    """Firings of every feature by cell, and by task within one cell. Batches may be cut anywhere."""

    def __init__(self, d_sae: int, n_cells: int, n_tasks: int):
        self.hits = torch.zeros(n_cells, d_sae, dtype=torch.int64)
        self.n_tasks = n_tasks
        self._by_task = SparseTally()

    @torch.no_grad()
    def update(
        self,
        sae: SparseDictionary,
        resid: Float[torch.Tensor, "row d_model"],
        cell: Int[np.ndarray, " row"],
        task: Int[np.ndarray, " row"],
    ) -> None:
        """Count a batch; `cell` is -1 for rows that do not count, `task` for those counted by cell alone."""
        codes = sae.encode(resid)
        fires = codes.values != 0
        rows, features, d_sae = codes.rows[fires], codes.indices[fires], self.hits.shape[1]
        in_cells, in_tasks = (_keys(group, rows, features, d_sae) for group in (cell, task))
        self.hits += torch.bincount(in_cells, minlength=self.hits.numel()).view_as(self.hits)
        self._by_task.add(in_tasks.numpy())

    @property
    def task_hits(self) -> csc_array:
        """[task, d_sae] firings by task."""
        keys, counts = self._by_task.totals()
        tasks, features = np.divmod(keys, self.hits.shape[1])
        return csc_array((counts, (tasks, features)), shape=(self.n_tasks, self.hits.shape[1]), dtype=np.int32)


def _keys(
    group: Int[np.ndarray, " row"],
    rows: Int[torch.Tensor, " firing"],
    features: Int[torch.Tensor, " firing"],
    d_sae: int,
) -> Int[torch.Tensor, " counted"]:
    """group * d_sae + feature of the firings in rows that have a group."""
    mine = torch.from_numpy(group)[rows]
    return (mine * d_sae + features)[mine >= 0]
