// Sorts and filters the tables of a report and opens what a link leads to. The page is whole without it. It keeps
// nothing (an artifact viewer shows the page in a frame that may run scripts and nothing else) and asks no server.
(() => {
  "use strict";

  const MOST_ROWS_WITHOUT_FILTER = 10;
  const NUMBER = /^([<>]?)\s*([-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?=$|[\s*/%(])/i;
  const MISSING = new Set(["", "–", "undefined", "unknown"]);
  const words = new Intl.Collator("en", { numeric: true });

  /** What a cell shows first: the matrix writes intervals below effects. */
  const shown = (row, column) => (row.cells[column]?.firstChild?.textContent ?? "").trim();

  /** The number at the start of a text. "<0.001" says: above 0, and too small for three decimals. */
  const numberOf = (text) => {
    const found = NUMBER.exec(text);
    if (found === null) return NaN;
    const value = Number(found[2].replace("−", "-").replaceAll(",", ""));
    return found[1] === "" ? value : value / 4;
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const original = [...body.rows];
    [...table.tHead.rows[0].cells].forEach((header, column) => {
      const name = header.textContent;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      if (header.querySelector("a") === null) {
        button.append(...header.childNodes);
      } else {
        button.setAttribute("aria-label", `Sort by ${name}`);
      }
      header.append(button);
      button.addEventListener("click", () => {
        const before = header.getAttribute("aria-sort");
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        if (before === "descending") {
          body.append(...original);
          return;
        }
        const after = before === "ascending" ? "descending" : "ascending";
        header.setAttribute("aria-sort", after);
        body.append(...ordered(original, column, after === "ascending" ? 1 : -1));
      });
    });
  };

  /** Rows by the values of a column: numbers as numbers; what is no number where most are, then what is undefined, last. */
  const ordered = (rows, column, sign) => {
    const entries = rows.map((row) => {
      const text = shown(row, column);
      return { row, text, number: numberOf(text), missing: MISSING.has(text) || text.startsWith("– ") };
    });
    const known = entries.filter((entry) => !entry.missing);
    const numeric = 2 * known.filter((entry) => !Number.isNaN(entry.number)).length > known.length;
    const rank = (entry) => (entry.missing ? 2 : numeric && Number.isNaN(entry.number) ? 1 : 0);
    const compared = (a, b) => {
      if (rank(a) !== rank(b)) return rank(a) - rank(b);
      if (rank(a) === 2) return 0;
      return sign * (numeric && rank(a) === 0 ? a.number - b.number : words.compare(a.text, b.text));
    };
    return entries.sort(compared).map((entry) => entry.row);
  };

  const filterable = (table, number) => {
    const rows = [...table.tBodies[0].rows];
    const box = document.createElement("div");
    const label = document.createElement("label");
    const field = document.createElement("input");
    const count = document.createElement("output");
    const about = document.createElement("span");
    const heading = table.closest("section")?.querySelector("h2, h3")?.textContent ?? `table ${number + 1}`;
    box.className = "filter";
    about.className = "away";
    about.textContent = ` rows: ${heading}`;
    field.type = "search";
    field.id = `filter-${number}`;
    field.autocomplete = "off";
    field.spellcheck = false;
    label.htmlFor = count.htmlFor = field.id;
    label.append("Filter", about);
    count.setAttribute("aria-live", "polite");
    count.textContent = `${rows.length} rows`;
    box.append(label, field, count);
    (table.closest(".scroll") ?? table).before(box);
    const plain = (text) => text.toLowerCase().replace(/\s+/g, " ").trim();
    const texts = rows.map((row) => [...row.cells].map((cell) => plain(cell.textContent)).join("\n"));
    field.addEventListener("input", () => {
      // as it is written, not word by word: "T cell" is a name
      const wanted = plain(field.value);
      let left = 0;
      rows.forEach((row, index) => {
        row.hidden = !texts[index].includes(wanted);
        left += row.hidden ? 0 : 1;
      });
      count.textContent = wanted !== "" ? `${left} of ${rows.length} rows` : `${rows.length} rows`;
    });
  };

  /** Open what a link leads to and all around it. */
  const open = (target) => {
    for (let around = target; around !== null; around = around.parentElement) {
      if (around instanceof HTMLDetailsElement) around.open = true;
    }
    if (target.matches("section")) target.querySelector("details")?.setAttribute("open", "");
  };

  const targetOf = (hash) => (hash.length > 1 ? document.getElementById(decodeURIComponent(hash.slice(1))) : null);

  const openAddressed = () => {
    const target = targetOf(location.hash);
    if (target === null) return;
    open(target);
    target.scrollIntoView();
  };

  document.querySelectorAll("table").forEach((table, number) => {
    const n_rows = table.tBodies[0]?.rows.length ?? 0;
    if (table.tHead === null || n_rows < 2) return;
    sortable(table);
    if (n_rows > MOST_ROWS_WITHOUT_FILTER) filterable(table, number);
  });

  addEventListener("hashchange", openAddressed);
  openAddressed();
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest('a[href^="#"]') : null;
    const target = link === null ? null : targetOf(link.getAttribute("href"));
    if (target === null) return;
    open(target);
    // in a frame an address may belong to the page around it: go there without one
    if (window === window.parent) return;
    event.preventDefault();
    target.tabIndex = -1;
    target.focus({ preventScroll: true });
    target.scrollIntoView();
  });

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of opened) one.open = false;
    opened = [];
  });
})();
