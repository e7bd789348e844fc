"""Meshes of flat faces, built once and painted many times.

A body's own axes: x right, y up, z forward, origin on the ground in its middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from roadseg.town.canvas import SHIFT, Canvas, Lamp, fixed

# What a face is painted with; a palette has one RGB for each.
BODY, SECOND, GLASS, TYRE, HUB, TRIM, PLATE, TAIL, HEAD, AMBER, GREEN, DARK = range(12)
_SHINES = {TAIL: (255.0, 40.0, 30.0), HEAD: (255.0, 245.0, 215.0)}


Span = tuple[float, float]
Box = tuple[Span, Span, Span]  # x, y, z


@dataclass(frozen=True)
class Mesh:
    """Faces are in painting order within each group; groups are painted far to near. A face is visible
    only from outside. A detail lies on a face and is not part of the outline."""

    vertices: np.ndarray  # [V, 3]
    bounds: tuple[tuple[int, int], ...]  # of each face, in the vertices
    normals: np.ndarray  # [F, 3], outwards
    anchors: np.ndarray  # [F, 3], a vertex of each face
    paints: np.ndarray  # [F]
    detail: np.ndarray  # [F], bool
    sizes: np.ndarray  # [F], the second largest extent of each face, m
    groups: tuple[tuple[np.ndarray, tuple[int, ...]], ...]  # (centre [3], faces)
    core: Box | None  # a box wholly inside the body, where it hides much of what is behind it


class Modeller:
    """Collects the faces of a mesh."""

    def __init__(self) -> None:
        self._faces: list[tuple[np.ndarray, np.ndarray, int, bool, int]] = []
        self.group = 0
        self.core: Box | None = None

    def face(
        self, points: Sequence[Sequence[float]] | np.ndarray, outward: Sequence[float], paint: int, detail: bool = True
    ) -> None:
        """A planar polygon; `outward` tells on which side its outside is."""
        p = np.asarray(points, float)
        normal = np.cross(p[1] - p[0], p[2] - p[1])
        normal /= np.linalg.norm(normal) + 1e-12
        if normal @ np.asarray(outward, float) < 0:
            normal = -normal
        self._faces.append((p, normal, paint, detail, self.group))

    def box(self, x: Span, y: Span, z: Span, paint: int) -> None:
        for axis in range(3):
            for end in (0, 1):
                spans = [x, y, z]
                a, b = [k for k in range(3) if k != axis]
                points = []
                for i, j in ((0, 0), (1, 0), (1, 1), (0, 1)):
                    p = [0.0, 0.0, 0.0]
                    p[axis], p[a], p[b] = spans[axis][end], spans[a][i], spans[b][j]
                    points.append(p)
                outward = [0.0, 0.0, 0.0]
                outward[axis] = 2.0 * end - 1
                self.face(points, outward, paint, detail=False)

    def prism(self, profile: Sequence[tuple[float, float, float]], paint: int) -> None:
        """A body from its side view: (z, y, half width) from the rear foot over the top to the front foot."""
        centre = np.mean([(0, y, z) for z, y, _ in profile], axis=0)
        # The sides may lean inwards at the top, so they are not quite planar: seen from wherever any
        # of them is, they close the silhouette.
        narrow = int(np.argmin([w for _, _, w in profile]))
        for sign in (-1, 1):
            side = np.array([(sign * w, y, z) for z, y, w in (*profile[narrow:], *profile[:narrow])], float)
            self._faces.append((side, np.array([sign, 0.0, 0.0]), paint, False, self.group))
        for i in range(len(profile)):
            strip = self.strip(profile, i)
            self.face(strip, strip.mean(axis=0) - centre, paint, detail=False)

    @staticmethod
    def strip(profile: Sequence[tuple[float, float, float]], i: int) -> np.ndarray:
        """The face of a prism from its point i to the next: left to right, then back."""
        (z0, y0, w0), (z1, y1, w1) = profile[i], profile[(i + 1) % len(profile)]
        return np.array([(-w0, y0, z0), (w0, y0, z0), (w1, y1, z1), (-w1, y1, z1)])

    def on(
        self, quad: np.ndarray, u: tuple[float, float], v: tuple[float, float], paint: int, outward: Sequence[float]
    ) -> None:
        """A detail on a quad, at u, v in 0..1 of its first and second side."""
        points = []
        for a, b in ((u[0], v[0]), (u[1], v[0]), (u[1], v[1]), (u[0], v[1])):
            points.append((1 - b) * ((1 - a) * quad[0] + a * quad[1]) + b * ((1 - a) * quad[3] + a * quad[2]))
        self.face(points, outward, paint)

    def both_sides(self, half_w: float, corners_zy: Sequence[tuple[float, float]], paint: int) -> None:
        for sign in (-1, 1):
            self.face([(sign * half_w, y, z) for z, y in corners_zy], (sign, 0, 0), paint)

    def wheels(self, half_w: float, at_z: Sequence[float], radius: float, width: float = 0.24) -> None:
        """Treads; call before the body. `discs` puts the sides on after it."""
        for z in at_z:
            for sign in (-1, 1):
                x = (sign * half_w, sign * (half_w - width))
                self.box((min(x), max(x)), (0.0, 1.4 * radius), (z - 0.7 * radius, z + 0.7 * radius), TYRE)

    def discs(self, half_w: float, at_z: Sequence[float], radius: float) -> None:
        turn = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        for z in at_z:
            for r, paint in ((radius, TYRE), (0.58 * radius, HUB), (0.2 * radius, TYRE)):
                ring = [(z + r * np.cos(t), radius + r * np.sin(t)) for t in turn]
                for sign in (-1, 1):
                    x = sign * (half_w + 0.01)
                    self.face([(x, y, a) for a, y in ring], (sign, 0, 0), paint, detail=r < radius)

    def mesh(self) -> Mesh:
        ends = np.cumsum([0] + [len(f[0]) for f in self._faces]).tolist()
        groups = []
        for g in sorted({f[4] for f in self._faces}):
            faces = tuple(i for i, f in enumerate(self._faces) if f[4] == g)
            groups.append((np.concatenate([self._faces[i][0] for i in faces]).mean(axis=0), faces))
        return Mesh(
            np.concatenate([f[0] for f in self._faces]),
            tuple(zip(ends[:-1], ends[1:], strict=True)),
            np.array([f[1] for f in self._faces]),
            np.array([f[0][0] for f in self._faces]),
            np.array([f[2] for f in self._faces]),
            np.array([f[3] for f in self._faces]),
            np.array([np.sort(np.ptp(f[0], axis=0))[1] for f in self._faces]),
            tuple(groups),
            self.core,
        )


def paint_mesh(
    canvas: Canvas, mesh: Mesh, place: np.ndarray, yaw: float, scale: np.ndarray, palette: np.ndarray, label: int
) -> int:
    """Paint a mesh at a place [3], turned by yaw, scaled [3]. Returns its object number, 0 if not in view."""
    s, c = np.sin(yaw), np.cos(yaw)
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])  # rows: right, up, forward in the world
    uv, depth = canvas.camera.project((mesh.vertices * scale) @ turn + place)
    if depth.min() < 0.6 or _outside(canvas, uv):
        return 0
    eye = (turn @ (canvas.camera.position - place)) / scale
    seen = ((eye - mesh.anchors) * mesh.normals).sum(axis=1) > 0
    seen &= ~mesh.detail | (mesh.sizes * canvas.camera.focal_px > 0.6 * depth.min())
    number = canvas.begin(label, uv, float(depth[0]))
    colours = np.minimum(palette[mesh.paints] * canvas.light.shade(mesh.normals @ turn), 255).tolist()
    points, shown, detail, paints = fixed(uv), seen.tolist(), mesh.detail.tolist(), mesh.paints.tolist()
    order = sorted(mesh.groups, key=lambda g: -float(((g[0] - eye) ** 2).sum()))
    for _, faces in order:
        for i in faces:
            if shown[i]:
                a, b = mesh.bounds[i]
                paint, colour = paints[i], colours[i]
                if canvas.light.night and paint in _SHINES:
                    colour = _shine(canvas, uv[a:b], float(depth[a]), paint, number)
                cv2.fillPoly(canvas.image, [points[a:b]], colour, cv2.LINE_AA, SHIFT)
                if not detail[i]:
                    cv2.fillPoly(canvas.objects, [points[a:b]], number, cv2.LINE_8, SHIFT)
    return number


def _outside(canvas: Canvas, uv: np.ndarray) -> bool:
    low, high = uv.min(axis=0), uv.max(axis=0)
    return bool(high[0] < 0 or high[1] < 0 or low[0] > canvas.camera.width_px or low[1] > canvas.camera.height_px)


def _shine(canvas: Canvas, uv: np.ndarray, depth: float, paint: int, number: int) -> tuple[float, float, float]:
    u, v = uv.mean(axis=0).tolist()
    reach = (0.9 if paint == HEAD else 0.5) * canvas.camera.focal_px / depth
    canvas.lamps.append(Lamp(u, v, reach, _SHINES[paint], number))
    return _SHINES[paint]
