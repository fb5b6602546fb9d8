"""Couplings of large clouds: from the plan of a few cells, refined, by exact plans in blocks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lipbook._processes import Team
from lipbook.wasserstein.clouds import Cloud, Pair, distances, pair_distances
from lipbook.wasserstein.exact import Plan, network_simplex, northwest
from lipbook.wasserstein.transforms import cut_into_cells

__all__ = ["COARSE", "axes", "coupling", "order_of_cells", "refined"]

COARSE = 256  # cells a side whose plan is exact
_FINER = 2  # doublings from a level to the next

# Note [blocks]
# The points of each cloud are put in an order in which those of a cell follow each other, at every
# level of a tree of halves. The mass of a cell, in its middle, makes a cloud of few points, whose
# plan is exact. A plan between cells is one between their parts: the north-west corner rule gives
# the parts of a cell of x, in their order, to its moves, and what arrives in a cell of y to its
# parts. That displaces mass by a cell at most, which sweeps at this level then mend.
#
# A coupling is a list of moves, a few times n + m of them. A sweep cuts the list into blocks of
# moves whose middles are close to each other, along other directions each time, and replaces every
# block by the exact plan between its own marginals. Marginals stay, the cost cannot grow.


def coupling(
    pair: Pair,
    directions: Tensor,
    sweeps: int,
    enough: float,
    rng: np.random.Generator,
    team: Team,
) -> Plan:
    """Refine the exact plan of COARSE cells to the points, with sweeps at each level.

    A level has no further sweep once one has improved the cost by less than the part ``enough``.
    Processes of a team share the blocks of a sweep.
    """
    both = pair.x, pair.y
    sizes = [len(cloud.mass) for cloud in both]
    depth = (max(sizes) - 1).bit_length()
    places = [(cloud.points @ directions).cpu().numpy() for cloud in both]
    orders = [order_of_cells(place, (len(place) - 1).bit_length()) for place in places]
    level = min(COARSE.bit_length() - 1, depth)
    now = _level(pair, orders, level)
    cost = distances(now.x.points, now.y.points)[0]
    factor = pair.x.total / pair.y.total
    plan = network_simplex(cost, now.x.mass, now.y.mass * factor)[0]
    while level < depth:
        level = min(level + _FINER, depth)
        now = _level(pair, orders, level)
        plan = refined(plan, now.x.mass, now.y.mass * factor)
        place = [(cloud.points @ directions).cpu().numpy() for cloud in (now.x, now.y)]
        plan = _swept(now, plan, place, sweeps, enough, rng, team)
    return Plan(orders[0][plan.i], orders[1][plan.j], plan.mass)


def axes(pair: Pair, number: int, rng: np.random.Generator) -> Tensor:
    """Orthonormal directions (d, number) along which both clouds together spread most."""
    points = torch.cat((pair.x.points, pair.y.points))
    points = points - points.mean(0)
    directions = torch.from_numpy(rng.standard_normal((points.shape[1], number))).to(points)
    for _ in range(3):
        directions = torch.linalg.qr(points.mT @ (points @ directions))[0]
    return directions


def order_of_cells(place: np.ndarray, depth: int) -> np.ndarray:
    """Order points by a tree of halves, each across the longest axis of its cell."""
    n = len(place)
    rank, order = np.arange(n), np.arange(n)
    for level in range(depth):
        cell = (rank << level) // n
        count = np.bincount(cell)
        there = place[order]
        spread = [
            np.bincount(cell, (z - (np.bincount(cell, z) / count)[cell]) ** 2) for z in there.T
        ]
        longest = np.argmax(spread, 0)[cell]
        order = order[np.lexsort((there[rank, longest], cell))]
    return order


def _level(pair: Pair, orders: list[np.ndarray], level: int) -> Pair:
    """Give the clouds of the cells of a level of the tree: their masses, in their middles."""
    clouds = []
    for cloud, order in zip((pair.x, pair.y), orders, strict=True):
        n = len(order)
        index = torch.from_numpy(order).to(cloud.points.device)
        points, mass = cloud.points[index], cloud.mass[order]
        if n > 1 << level:
            cell = (np.arange(n) << level) // n
            sums = np.bincount(cell, mass)
            shares = torch.from_numpy(mass / sums[cell]).to(points)
            middles = points.new_zeros(len(sums), points.shape[1])
            cells = torch.from_numpy(cell).to(points.device)
            points, mass = middles.index_add_(0, cells, points * shares[:, None]), sums
        clouds.append(Cloud(points, points[:0], mass, cloud.total, torch.arange(len(mass)), n))
    return pair._replace(x=clouds[0], y=clouds[1])


def refined(plan: Plan, a: np.ndarray, b: np.ndarray) -> Plan:
    """Make a plan between parts, in the order of their cells, of one between cells."""
    order = np.lexsort((plan.j, plan.i))
    sent = northwest(a, plan.mass[order])
    cell = plan.j[order][sent.j]
    order = np.argsort(cell, kind="stable")
    arrived = northwest(sent.mass[order], b)
    return Plan(sent.i[order][arrived.i], arrived.j, arrived.mass)


def _swept(
    pair: Pair,
    plan: Plan,
    place: list[np.ndarray],
    sweeps: int,
    enough: float,
    rng: np.random.Generator,
    team: Team,
) -> Plan:
    before = math.inf
    for _ in range(sweeps):
        plan = _sweep(pair, plan, place[0][plan.i] + place[1][plan.j], rng, team)
        cost = plan.mass @ pair_distances(pair.x.points, pair.y.points, plan.i, plan.j)
        if before - cost <= enough * cost:
            break
        before = cost
    return plan


def _sweep(pair: Pair, plan: Plan, place: np.ndarray, rng: np.random.Generator, team: Team) -> Plan:
    """Replace the moves of each block of neighbours by an exact plan."""

    def solved(block: np.ndarray) -> Plan:
        i, at_i = np.unique(plan.i[block], return_inverse=True)
        j, at_j = np.unique(plan.j[block], return_inverse=True)
        if len(i) == 1 or len(j) == 1:
            return Plan(plan.i[block], plan.j[block], plan.mass[block])
        a, b = np.bincount(at_i, plan.mass[block]), np.bincount(at_j, plan.mass[block])
        device = pair.x.points.device
        cost = distances(
            pair.x.points[torch.from_numpy(i).to(device)],
            pair.y.points[torch.from_numpy(j).to(device)],
        )[0]
        part = network_simplex(cost, a, b)[0]
        return Plan(i[part.i], j[part.j], part.mass)

    parts = team.map(solved, list(cut_into_cells(place, rng)))
    return Plan(*(np.concatenate(column) for column in zip(*parts, strict=True)))
