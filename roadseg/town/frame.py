"""Render one frame of the town: paint the scene, simulate the camera, and extract the labels."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import cv2
import numpy as np

from roadseg.errors import UsageError
from roadseg.labels import CITYSCAPES
from roadseg.town import frontage, ground, people, roadside, vehicles
from roadseg.town.camera import draw_camera
from roadseg.town.canvas import Canvas
from roadseg.town.finish import photograph
from roadseg.town.light import Weather, draw_light
from roadseg.town.scene import LENGTH_M, Item, Scene, draw_scene
from roadseg.town.sky import paint_sky
from roadseg.town.visibility import visible

WEATHERS: tuple[Weather, ...] = ("clear", "night", "fog", "rain")
_HAS_INSTANCES = frozenset(c.id for c in CITYSCAPES.classes if c.has_instances)
_NAMES = {c.id: c.name for c in CITYSCAPES.classes}


@dataclass(frozen=True)
class Frame:
    """image: uint8 [H, W, 3] RGB. label_ids: uint8 [H, W], Cityscapes ids. instance_ids: uint16 [H, W], the
    label id, or label id * 1000 + n for classes with instances. polygons: the visible outlines,
    {"label": name, "polygon": [[x, y], ...]}, far to near. Painted in this order they reproduce label_ids, except
    single pixels on borders and what is visible through gaps of a nearer object."""

    image: np.ndarray
    label_ids: np.ndarray
    instance_ids: np.ndarray
    polygons: list[dict[str, Any]]


def render(seed: int, index: int, width_px: int, height_px: int, weather: Weather = "clear") -> Frame:
    """The scene (seed, index) at this size; a pure function of its arguments.

    The weather changes the image but not the labels. Raises UsageError for an unknown weather and for frames
    smaller than 32 px per side.
    """
    if weather not in WEATHERS or min(width_px, height_px) < 32:
        raise UsageError(
            f"weather {weather!r} at {width_px}x{height_px}",
            expected=f"one of {', '.join(WEATHERS)}, and at least 32 px a side",
            where="town.render",
        )
    scene = draw_scene(seed, index)
    name = f"town/{seed}/{index}"
    looks = Random(f"{name}/looks")
    canvas = Canvas(
        draw_camera(Random(f"{name}/camera"), width_px, height_px, looks.uniform(-0.4, 0.4)),
        draw_light(Random(f"{name}/light"), weather),
        np.zeros((height_px, width_px, 3), np.uint8),
        np.zeros((height_px, width_px), np.uint16),
    )
    paint_sky(canvas, Random(f"{name}/sky"))
    ground.paint_ground(canvas, scene, Random(f"{name}/ground"))
    ground.paint_shadows(canvas, _bodies(scene))
    if canvas.light.night:
        lamps = [scene.street.at(i.lateral_m, i.along_m) for i in scene.items if i.kind == "pole"]
        ground.night_ground(canvas, np.array(lamps).reshape(-1, 3))
    frontage.paint_skyline(canvas, Random(f"{name}/skyline"))
    for item in visible(canvas.camera, scene):
        _paint(canvas, scene, item)
    if looks.random() < 0.35:
        roadside.paint_bonnet(canvas, looks)
    labels, instances = _labels(canvas)
    return Frame(photograph(canvas, Random(f"{name}/sensor")), labels, instances, _polygons(canvas))


def _paint(canvas: Canvas, scene: Scene, item: Item) -> None:
    kind, street = item.kind, scene.street
    place = street.at(item.lateral_m, item.along_m)
    yaw, rng = item.yaw + street.heading(item.along_m), Random(item.seed)
    if kind in vehicles.LABELS:
        vehicles.paint_vehicle(canvas, kind, place, yaw, rng)
    elif kind in ("bicycle", "cyclist", "motorcycle", "motorcyclist"):
        people.paint_two_wheeler(canvas, kind.startswith("motor"), kind.endswith("cyclist"), place, yaw, rng)
    elif kind == "person":
        people.paint_person(canvas, place, yaw, rng)
    elif kind in ("tree", "bush"):
        frontage.paint_tree(canvas, place, kind == "bush", rng)
    elif kind == "clutter":
        roadside.paint_clutter(canvas, place, yaw, rng)
    elif kind == "bollard":
        roadside.paint_bollards(canvas, place, rng)
    elif kind in _ALONG:
        _ALONG[kind](canvas, street, item, rng)
    else:
        _BESIDE[kind](canvas, place, item.side, rng)


_ALONG = {
    "building": frontage.paint_building,
    "wall": frontage.paint_wall,
    "fence": frontage.paint_fence,
    "hedge": frontage.paint_hedge,
}
_BESIDE = {"pole": roadside.paint_pole, "sign": roadside.paint_sign, "light": roadside.paint_traffic_light}


def _bodies(scene: Scene) -> list[tuple[np.ndarray, float]]:
    """Base rectangle and height of every object that casts a shadow."""
    sizes = {"car": (0.9, 1.4), "truck": (1.2, 3.2), "bus": (1.25, 3.0), "train": (1.2, 3.3)}
    street = scene.street
    bodies = []
    for item in scene.items:
        if item.along_m > 45:
            continue
        at = (street, item.lateral_m, item.along_m, item.yaw + street.heading(item.along_m))
        if item.kind in sizes:
            half, height = sizes[item.kind]
            bodies.append((ground.footprint(*at, half, LENGTH_M[item.kind] / 2), height))
        elif item.kind in ("building", "wall", "fence", "hedge"):
            corners = [(item.lateral_m, item.along_m), (item.lateral_m, item.far_m)]
            corners += [(x + item.side * (10 if item.kind == "building" else 0.5), z) for x, z in corners[::-1]]
            height = {"building": 9.0, "fence": 1.0}.get(item.kind, 2.0)
            bodies.append((np.array([street.at(x, z) for x, z in corners]), height))
        elif item.kind == "tree":
            bodies.append((ground.footprint(*at, 1.2, 1.2), 5.5))
        else:
            slim = 0.12 if item.kind in ("pole", "sign", "light") else 0.25
            long = 0.8 if "cycl" in item.kind else slim
            bodies.append((ground.footprint(*at, slim, long), 4.0 if slim < 0.2 else 1.6))
    return bodies


def _labels(canvas: Canvas) -> tuple[np.ndarray, np.ndarray]:
    counts: dict[int, int] = {}
    instances = []
    for label in canvas.labels:
        if label in _HAS_INSTANCES:
            instances.append(label * 1000 + counts.get(label, 0))
            counts[label] = counts.get(label, 0) + 1
        else:
            instances.append(label)
    return (
        np.take(np.array(canvas.labels, np.uint8), canvas.objects),
        np.take(np.array(instances, np.uint16), canvas.objects),
    )


def _polygons(canvas: Canvas) -> list[dict[str, Any]]:
    found = []
    for number in np.flatnonzero(np.bincount(canvas.objects.ravel())).tolist():
        x0, y0, x1, y1 = canvas.boxes[number]
        shown = (canvas.objects[y0:y1, x0:x1] == number).view(np.uint8)
        outlines, _ = cv2.findContours(shown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=(x0, y0))
        for outline in outlines:
            # Simplify staircases to lines, as in hand-drawn polygons; labels move by less than a pixel.
            corners = cv2.approxPolyDP(outline, 0.6, True)
            if len(corners) >= 3:
                found.append({"label": _NAMES[canvas.labels[number]], "polygon": corners[:, 0].tolist()})
    return found
