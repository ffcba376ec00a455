// The mesh as this node sees it: itself in the middle, the others around it.

import { svg } from "./dom.js";
import { count, milliseconds } from "./format.js";

const RADIUS = 22;
// More nodes than these, and second lines and times, or names, overlap; the table has them.
const ROOM = { narrow: { about: 4, named: 5 }, wide: { about: 8, named: 14 } };
const RING_MAX = 16; // more take two rings
const DRAWN_MAX = 60;
const NAME_CHARS_MAX = 16;
const NAME_HALF_PX = 66; // half the width of the longest label
const SIGNS = { live: "✓", suspect: "?", dead: "×" };

/** The drawing of `nodes`, `available` pixels wide. */
export function topology(nodes, available) {
  const width = Math.max(200, Math.round(available));
  const me = nodes.find((node) => node.self);
  const others = nodes.filter((node) => !node.self).slice(0, DRAWN_MAX);
  const narrow = width < 480;
  const room = narrow ? ROOM.narrow : ROOM.wide;
  const size = {
    x: Math.min(width / 2 - (others.length > room.named ? RADIUS + 6 : NAME_HALF_PX), 260),
    y: others.length <= 2 ? 150 : others.length <= room.about ? 135 : 165,
  };
  const angles = others.map((_, index) => angleOf(index, others.length, narrow));
  const places = others.map((node, index) => {
    const inner = others.length > RING_MAX && index % 2 ? 0.62 : 1;
    const [dx, dy] = [Math.cos(angles[index]) * size.x, Math.sin(angles[index]) * size.y];
    return { node, x: dx * inner, y: dy * inner, above: dy < -10 };
  });
  const top = Math.min(0, ...places.map((at) => at.y - (at.above ? 68 : 40)), -40);
  const bottom = Math.max(0, ...places.map((at) => at.y + 70), 70);
  const hidden = nodes.length - places.length - (me ? 1 : 0);
  const viewBox = `${-width / 2} ${top} ${width} ${bottom - top}`;
  return svg(
    "svg",
    { role: "img", "aria-label": describe(nodes), viewBox, width, height: bottom - top },
    ...places.flatMap((at) => link(at, others.length <= room.about)),
    ...places.map((at) => mark(at, others.length > room.named ? 0 : others.length > room.about ? 1 : 2)),
    ...(me ? [mark({ node: me, x: 0, y: 0, above: false }, 2)] : []),
    ...(hidden > 0 ? [svg("text", { x: 0, y: bottom - 6 }, `and ${hidden} more in the table`)] : []),
  );
}

function angleOf(index, total, narrow) {
  // Nobody straight below, where the middle's own label is.
  if (total === 2 && narrow) return -Math.PI / 2 + (index - 0.5) * 1.7;
  const start = -Math.PI / 2 + (total % 2 ? 0 : Math.PI / total);
  return start + (2 * Math.PI * index) / total;
}

function link(to, timed) {
  const state = to.node.state;
  const line = svg("line", { class: `state ${state}`, x1: 0, y1: 0, x2: to.x, y2: to.y });
  if (!timed || to.node.rtt_ms === null || state === "dead") return [line];
  const at = { x: to.x * 0.52, y: to.y * 0.52 + 4 };
  return [line, svg("text", { class: "rtt", ...at }, milliseconds(to.node.rtt_ms))];
}

function mark({ node, x, y, above }, lineCount) {
  const parts = [
    svg("title", {}, `${node.name}: ${node.state}`),
    svg("circle", { cx: x, cy: y, r: RADIUS }),
    svg("text", { class: "sign", x, y: y + 5 }, SIGNS[node.state] ?? ""),
  ];
  if (node.self) parts.push(svg("circle", { class: "halo", cx: x, cy: y, r: RADIUS + 5 }));
  const about = `${node.self ? "this node" : node.state} · ${count(node.models.length, "model")}`;
  const lines = [["name", shortened(node.name)], ["about", about]].slice(0, lineCount);
  const first = above ? y - RADIUS - 10 - 17 * (lines.length - 1) : y + RADIUS + 21;
  lines.forEach(([kind, text], index) => {
    parts.push(svg("text", { class: kind, x, y: first + 17 * index }, text));
  });
  return svg("g", { class: `state ${node.state}` }, ...parts);
}

function shortened(name) {
  return name.length > NAME_CHARS_MAX ? `${name.slice(0, NAME_CHARS_MAX - 1)}…` : name;
}

function describe(nodes) {
  const names = nodes.map((node) => `${node.name}${node.self ? " (this node)" : ""} ${node.state}`);
  return `${count(nodes.length, "node")}: ${names.join(", ")}`;
}
