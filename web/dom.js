// Building and updating elements. Data only ever becomes text: nothing here parses HTML.

/** A new element. Properties are set as attributes, children are nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** A new SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets text only when it differs, so that a selection in it survives. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Replaces children only when `value` differs from the last one given for this element. */
const shown = new WeakMap();
export function fill(element, value, build) {
  const key = JSON.stringify(value);
  if (shown.get(element) === key) return;
  shown.set(element, key);
  element.replaceChildren(...build(value));
}

/**
 * Brings a table's body in line with `items`: rows are kept by key, cells change one by one.
 * A column is {label, value(item), build(value), number?}; the first one heads its row.
 */
export function fillRows(body, items, keyOf, columns) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  items.forEach((item, index) => {
    const key = keyOf(item);
    const row = old.get(key) ?? newRow(key, columns);
    old.delete(key);
    columns.forEach((column, at) => fill(row.cells[at].firstChild, column.value(item), column.build));
    if (body.rows[index] !== row) body.insertBefore(row, body.rows[index] ?? null);
  });
  for (const row of old.values()) row.remove();
}

function newRow(key, columns) {
  const cells = columns.map((column, at) =>
    at === 0
      ? el("th", { role: "rowheader", scope: "row" }, el("div"))
      : el("td", { role: "cell", "data-label": column.label, class: column.number ? "number" : "" }, el("div")));
  return el("tr", { role: "row", "data-key": key }, ...cells);
}
