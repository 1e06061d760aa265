"""Where the names of points go: beside them, clear of each other, of other points and of their bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge."""


RADII = (3.0, 7.0, 12.0, 18.0, 26.0, 36.0, 48.0, 62.0, 80.0, 100.0, 125.0, 155.0, 190.0)
"""Distances between a point's marker and its name that are tried."""


DIRECTIONS = 24


PASSES = 4
"""How often every name is placed anew among the others."""


def place_labels(
    points: Sequence[tuple[float, float, float]],
    sizes: Sequence[tuple[float, float]],
    obstacles: Sequence[Box],
    lines: Sequence[Box],
    bounds: Box,
) -> list[Box]:
    """Place a label beside every point.

    Labels are placed one after the other, and anew among the others as long as that helps. What comes of it depends on
    the order, so several orders are tried.

    Args:
        points: Centre and radius of every labelled point.
        sizes: Width and height of its label.
        obstacles: What labels should not cover: markers and error bars.
        lines: What they may cover where there is no better place.
        bounds: What labels must stay inside of.

    Returns:
        The box of every label.
    """
    blocked, soft = (np.array(boxes, dtype=float).reshape(-1, 4) for boxes in (obstacles, lines))
    options = [list_boxes(point, size, bounds) for point, size in zip(points, sizes, strict=True)]
    leaders = [trace_leaders(point, boxes) for point, boxes in zip(points, options, strict=True)]
    alone = [
        weigh_boxes(point, boxes, traced, blocked, soft)
        for point, boxes, traced in zip(points, options, leaders, strict=True)
    ]
    numbers = list(range(len(points)))
    orders = [
        numbers,
        numbers[::-1],
        sorted(numbers, key=lambda number: points[number][0]),
        sorted(numbers, key=lambda number: points[number][1]),
        sorted(numbers, key=lambda number: -points[number][1]),
    ]
    tried = [settle(order, options, leaders, alone) for order in orders]
    _, chosen = min(tried, key=lambda found: found[0])
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in (options[n][chosen[n]] for n in numbers)]


def weigh_boxes(
    point: tuple[float, float, float],
    boxes: NDArray[np.float64],
    leaders: NDArray[np.float64],
    blocked: NDArray[np.float64],
    soft: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return what every place of a label costs by itself: distance, what it covers, and what its leader crosses."""
    cost = np.array([distance(point, box) for box in boxes])
    far = cost > RADII[2]
    crossed = crossing(blocked, leaders[:, 2:])
    return np.asarray(cost + 60.0 * covering(boxes, blocked) + 9.0 * covering(boxes, soft) + far * (10 + 15 * crossed))


def settle(
    order: Sequence[int],
    options: Sequence[NDArray[np.float64]],
    leaders: Sequence[NDArray[np.float64]],
    alone: Sequence[NDArray[np.float64]],
) -> tuple[float, list[int]]:
    """Place labels in an order, and anew as long as one moves; return what it costs, and every label's choice."""
    chosen = [-1] * len(options)
    costs = [0.0] * len(options)
    for _ in range(PASSES):
        before = list(chosen)
        for index in order:
            others = [number for number in range(len(options)) if number != index and chosen[number] >= 0]
            cost = alone[index].copy()
            if others:
                taken = np.array([options[number][chosen[number]] for number in others])
                drawn = np.concatenate([leaders[number][chosen[number]] for number in others])
                cost += 1000.0 * covering(options[index], taken) + 40.0 * holding(options[index], drawn)
                cost += 120.0 * crossing(taken, leaders[index])
            chosen[index] = int(cost.argmin())
            costs[index] = float(cost.min())
        if chosen == before:
            break
    return sum(costs), chosen


def list_boxes(point: tuple[float, float, float], size: tuple[float, float], bounds: Box) -> NDArray[np.float64]:
    """Return the boxes around a point that lie inside the bounds, or the one nearest to it that does."""
    x, y, radius = point
    wide, high = size
    found = []
    for reach in RADII:
        for turn in range(DIRECTIONS):
            angle = 2.0 * math.pi * turn / DIRECTIONS
            across, up = math.cos(angle), math.sin(angle)
            centre_x = x + (radius + reach) * across + wide / 2.0 * max(-1.0, min(1.0, 1.6 * across))
            centre_y = y + (radius + reach) * up + high / 2.0 * max(-1.0, min(1.0, 1.6 * up))
            found.append((centre_x - wide / 2, centre_y - high / 2, centre_x + wide / 2, centre_y + high / 2))
    left, low, right, top = bounds
    inside = [box for box in found if box[0] >= left and box[1] >= low and box[2] <= right and box[3] <= top]
    if not inside:
        centre_x, centre_y = max(left, min(x, right - wide)), max(low, min(y + radius + 3.0, top - high))
        inside = [(centre_x, centre_y, centre_x + wide, centre_y + high)]
    return np.array(inside)


def covering(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Count, for every box, the others that it overlaps.

    >>> covering(np.array([[0.0, 0.0, 2.0, 2.0]]), np.array([[1.0, 1.0, 3.0, 3.0], [2.5, 0.0, 3.0, 1.0]])).tolist()
    [1.0]
    """
    if not len(others):
        return np.zeros(len(boxes))
    one, other = boxes[:, None], others[None]
    apart = (one[..., 2] <= other[..., 0]) | (one[..., 0] >= other[..., 2])
    apart |= (one[..., 3] <= other[..., 1]) | (one[..., 1] >= other[..., 3])
    return np.asarray((~apart).sum(axis=1), dtype=float)


def holding(boxes: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Count, for every box, the places that lie in it."""
    return np.asarray(find_inside(boxes, places).sum(axis=1), dtype=float)


def crossing(boxes: NDArray[np.float64], leaders: NDArray[np.float64]) -> NDArray[np.float64]:
    """Count, for every leader, the boxes that one of its places lies in; leaders (L, places, 2)."""
    inside = find_inside(boxes, leaders.reshape(-1, 2)).reshape(len(boxes), *leaders.shape[:2])
    return np.asarray(inside.any(axis=2).sum(axis=0), dtype=float)


def find_inside(boxes: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Say which places lie in which boxes, (boxes, places)."""
    x, y = places[None, :, 0], places[None, :, 1]
    return (boxes[:, None, 0] < x) & (x < boxes[:, None, 2]) & (boxes[:, None, 1] < y) & (y < boxes[:, None, 3])


def nearest(point: tuple[float, float, float], box: Sequence[float]) -> tuple[float, float]:
    """Return the place of a box that is nearest to a point."""
    return max(box[0], min(point[0], box[2])), max(box[1], min(point[1], box[3]))


def distance(point: tuple[float, float, float], box: Sequence[float]) -> float:
    """Return how far a box is from a point's marker."""
    x, y = nearest(point, box)
    return max(0.0, math.hypot(x - point[0], y - point[1]) - point[2])


def trace_leaders(point: tuple[float, float, float], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return, for every box, places along the line from the point to it."""
    ends = np.array([nearest(point, box) for box in boxes])
    start = np.array(point[:2])
    return np.asarray(start + np.linspace(0.0, 0.97, 10)[None, :, None] * (ends - start)[:, None, :])


def spread_labels(heights: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Return heights near the given ones that are a step apart, between two bounds as far as there is room.

    >>> spread_labels([1.0, 1.0, 5.0], 2.0, 0.0, 10.0)
    [0.0, 2.0, 5.0]
    """
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [heights[index] for index in order]
    for _ in range(200):
        moved = False
        for first in range(len(placed) - 1):
            lack = step - (placed[first + 1] - placed[first])
            if lack > 1e-6:
                placed[first] -= lack / 2.0
                placed[first + 1] += lack / 2.0
                moved = True
        placed = [max(low, min(high, value)) for value in placed]
        if not moved:
            break
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + step)
    if placed and placed[-1] > high:
        shift = placed[-1] - high
        placed = [value - shift for value in placed]
    found = [0.0] * len(heights)
    for index, value in zip(order, placed, strict=True):
        found[index] = round(value, 6)
    return found
