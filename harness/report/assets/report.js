// Makes every table with a head sortable by its columns, by pointer and by keyboard. The page is complete
// without it. Cells that show a number in words carry its value in data-v.
"use strict";
for (const table of document.querySelectorAll("table")) {
  if (!table.tHead || table.tBodies[0].rows.length < 2) continue;
  if ([...table.tHead.rows[0].cells].some((head) => !head.textContent)) continue; // facts, not figures
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const next = before === "descending" ? "ascending" : before === "ascending" ? "" : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (!next) return body.append(...original);
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = [...original].sort((one, other) => sign * compare(one.cells[column], other.cells[column]));
      // What has no value stays at the end, whichever way the rest is sorted.
      body.append(...rows.filter((row) => !empty(row.cells[column])), ...rows.filter((row) => empty(row.cells[column])));
    });
  });
}
function empty(cell) {
  return cell.dataset.v === undefined && ["–", "not recorded", ""].includes(cell.textContent);
}
function compare(one, other) {
  const [a, b] = [one.dataset.v, other.dataset.v];
  if (a !== undefined && b !== undefined) return Number(a) - Number(b);
  if (a !== undefined || b !== undefined) return a === undefined ? 1 : -1;
  return one.textContent.localeCompare(other.textContent, "en", { numeric: true });
}
