// Numbers and addresses as people read them. Pure functions.

/** 1536 -> "1.5 KiB". */
export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let value = Math.max(0, count);
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${value.toFixed(at === 0 || value >= 100 ? 0 : 1)} ${units[at]}`;
}

/** Milliseconds, two significant figures; an en dash when there is none. */
export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  return `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

/** Seconds since 1970 as date and time of this place, without seconds. */
export function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

/** 1, "node" -> "1 node"; 2, "node" -> "2 nodes". */
export function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

/** An address that listens everywhere is reached, from here, under the name in the address bar. */
export function reachable(address, here) {
  const port = address.slice(address.lastIndexOf(":") + 1);
  const host = address.slice(0, -port.length - 1);
  return ["0.0.0.0", "[::]", "::", ""].includes(host) ? `${here}:${port}` : address;
}

/** A word for a POSIX shell. */
export function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}
