"use strict";
(() => {
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const kept = { get: (k) => { try { return sessionStorage.getItem(k); } catch { return null; } }, set: (k, v) => { try { sessionStorage.setItem(k, v); } catch { /* not allowed here */ } } };

  // The form of pictures stays the same from page to page.
  const forms = all('input[name="form"]');
  const last = document.getElementById("as-" + kept.get("form"));
  if (last) last.checked = true;
  for (const form of forms) form.addEventListener("change", () => kept.set("form", form.value));

  // Cards in another order.
  for (const select of all("select[data-order]")) {
    select.addEventListener("change", () => {
      const box = document.getElementById(select.dataset.order);
      const by = select.value, sign = by === "number" ? 1 : -1;
      box.append(...[...box.children].sort((a, b) => sign * (a.dataset[by] - b.dataset[by])));
    });
  }

  // Keys: / searches, arrows turn pages.
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const turn = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const shown = document.querySelector(".page:target") || document;
    const link = turn && shown.querySelector(`a[rel="${turn}"]`);
    if (link) location.href = link.href;
    const search = document.getElementById("query") || document.querySelector('[name="q"]');
    if (event.key === "/" && search) { event.preventDefault(); search.focus(); }
  });

  // Search: every word must be in an entry.
  const index = document.getElementById("index");
  if (!index) return;
  const query = document.getElementById("query"), results = document.getElementById("results"), count = document.getElementById("count");
  const { layers, classes, names, texts, samples } = JSON.parse(index.textContent);
  const entries = [];
  const percent = share => { // (as in the pages' text)
    const value = 100 * share, size = Math.abs(value);
    const few = value > 0 ? "<\u00a00.01" : ">\u00a0-0.01";
    const text = !size ? "0" : size < 0.005 ? few : value.toFixed(size >= 0.95 ? 1 : 2);
    return `${text}\u00a0%`.replace("-", "\u2212");
  };
  for (const [name, address] of classes) entries.push([name, "class", address, 2]);
  for (const [layer, address, concept, shares] of layers) {
    entries.push([layer, "layer", address, 1.5]);
    shares.forEach((share, i) => entries.push([`${layer} · ${i}${names[layer + ":" + i] ? " " + names[layer + ":" + i] : ""}`, `concept, ${percent(share)}${texts[layer + ":" + i] ? `, reads as “${texts[layer + ":" + i]}”` : ""}`, concept.replace("{}", i), share]));
  }
  for (const [name, address] of samples) entries.push([name, "sample", address, 0]);
  for (const entry of entries) entry.push((entry[0] + " " + entry[1] + " " + entry[0].replace(" · ", ":")).toLowerCase());
  const find = () => {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = words.length ? entries.filter((entry) => words.every((word) => entry[4].includes(word))) : [];
    const exact = query.value.trim().toLowerCase();
    const rank = (entry) => (entry[0].toLowerCase() === exact ? 9 : 0) + entry[3];
    found.sort((a, b) => rank(b) - rank(a));
    count.textContent = words.length ? `${found.length} found` : "";
    results.replaceChildren(...found.slice(0, 100).map(([name, kind, address]) => {
      const item = document.createElement("li"), link = document.createElement("a");
      link.href = address; link.textContent = name;
      item.append(link, ` ${kind}`);
      return item;
    }));
  };
  query.addEventListener("input", find);
  const asked = new URLSearchParams(location.search).get("q");
  if (asked) { query.value = asked; find(); }
  for (const form of all('form[role="search"]')) form.addEventListener("submit", (event) => {
    event.preventDefault();
    query.value = form.elements.q.value;
    if (document.getElementById("search.html")) location.hash = "search.html";
    find();
  });
})();
