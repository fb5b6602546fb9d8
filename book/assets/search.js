/* Search by section, in the dialog and on the search page.

   The index, MiniSearch and the word stems are loaded when somebody searches, by script elements,
   so that it works from a folder too. */

(() => {
  "use strict";

  const ROOT = document.documentElement.dataset.content_root || "./";
  const STATIC = `${ROOT}_static/`;
  const PARTS = ["vendor/minisearch.js", "language_data.js", "search-sections.js"];
  const QUESTIONS = ["how", "what", "when", "which", "why", "who", "where", "do", "does", "can",
    "i", "my", "we", "you", "your", "one", "should", "from", "an", "its", "be", "has", "have"];
  const SAME = new Map([
    ["spectrum", "spectral"], ["spectra", "spectral"], ["bjoerck", "bjorck"]]);
  const FIELDS = ["url", "page", "title", "text", "kind", "above", "terms", "worth"];
  const SHOWN = { dialog: 8, page: 30 };

  let engine = null;

  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = STATIC + name;
      script.onload = resolve;
      script.onerror = () => reject(new Error(`missing: ${name}`));
      document.head.append(script);
    });
  }

  const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();

  /* A word, without accents, in American spelling, as its stem; null for words that say nothing. */
  function stems() {
    const stemmer = new Stemmer();
    const nothing = new Set([...stopwords, ...QUESTIONS]);
    const known = new Map();
    return (word) => {
      if (!known.has(word)) {
        const plain = fold(word).replace(/['’]s?$/, "")
          .replace(/([a-z]{3})is(e[drs]?|ing|ations?|able)$/, "$1iz$2");
        const usual = SAME.get(plain) || plain;
        known.set(word, nothing.has(usual) || !usual ? null : stemmer.stemWord(usual));
      }
      return known.get(word);
    };
  }

  const split = (text) => text.split(/[^\p{L}\p{N}\p{M}]+/u).filter(Boolean);

  /* OrthogonalConv2d is found whole and by its parts. */
  function tokens(text) {
    return split(text).flatMap((word) => {
      const parts = word.match(/\p{Lu}?\p{Ll}+\p{N}*\p{Ll}*|\p{Lu}+|\p{N}+/gu) || [];
      return parts.length > 1 && /\p{Ll}\p{Lu}/u.test(word) ? [word, ...parts] : [word];
    });
  }

  async function start() {
    await Promise.all(PARTS.map(load));
    const stem = stems();
    const entries = window.lipbookSections.map((row, id) =>
      Object.fromEntries([["id", id], ...row.map((value, k) => [FIELDS[k], value])]));
    const index = new MiniSearch({
      fields: ["title", "page", "terms", "text"],
      tokenize: tokens,
      processTerm: stem,
      searchOptions: {
        boost: { title: 5, page: 2, terms: 3 },
        boostDocument: (id) => entries[id].worth,
        prefix: (term, k, terms) => k === terms.length - 1 && term.length > 2,
        weights: { prefix: 0.3, fuzzy: 0.2 },
      },
    });
    index.addAll(entries);
    return { index, entries, stem };
  }

  const ready = () => (engine ??= start());

  /* Entries for a query, best first: those with all its words before those with some. */
  function find({ index, entries, stem }, query) {
    const wanted = tokens(query).map(stem).filter(Boolean);
    const all = index.search(query, { combineWith: "AND" });
    const some = wanted.length > 1 ? index.search(query, { combineWith: "OR" }) : [];
    let hits = [...all];
    const seen = new Set(all.map((hit) => hit.id));
    hits.push(...some.filter((hit) => !seen.has(hit.id)));
    if (!hits.length) hits = index.search(query, { fuzzy: 0.25, combineWith: "AND" });
    // Words that stand together as in the query count more, most of all in a title.
    const phrase = wanted.join(" ");
    const names = new Set(fold(query).split(/[\s.]+/)); // of functions and classes, to the letter
    const score = (hit, k) => {
      const entry = entries[hit.id];
      const together = (text) =>
        ` ${split(text).map(stem).filter(Boolean).join(" ")} `.includes(` ${phrase} `);
      let factor = k < all.length ? 2 : 1;
      if (names.has(fold(entry.title))) factor *= 6;
      else if (wanted.length > 1 && together(entry.title)) factor *= 3;
      else if (wanted.length > 1 && together(entry.text)) factor *= 1 + wanted.length ** 2 / 4;
      return hit.score * factor;
    };
    // A theorem and the section that holds it are one hit, shown by the better of the two.
    const families = new Map();
    hits.slice(0, 120).forEach((hit, k) => {
      const entry = entries[hit.id];
      const family = entry.above || entry.url;
      families.set(family, [...(families.get(family) || []), [score(hit, k), entry]]);
    });
    return [...families.values()].map((members) => {
      members.sort((a, b) => b[0] - a[0]);
      const others = members.slice(1, 4).reduce((sum, [value]) => sum + value, 0);
      return [members[0][0] + others / 2, members[0][1]];
    }).sort((a, b) => b[0] - a[0]).map(([, entry]) => entry);
  }

  /* About 180 characters around the most of the words, from the start of a sentence if near. */
  function excerpt(entry, wanted, stem) {
    const places = [...entry.text.matchAll(/[\p{L}\p{N}\p{M}]+/gu)]
      .filter((match) => wanted.has(stem(match[0]))).map((match) => match.index);
    let [best, most] = [0, 0];
    for (const place of places) {
      const near = places.filter((other) => other >= place && other < place + 160).length;
      if (near > most) [best, most] = [place, near];
    }
    const before = entry.text.slice(Math.max(0, best - 90), best);
    const sentence = before.lastIndexOf(". ");
    let from = best - before.length;
    if (sentence >= 0) from += sentence + 2;
    else if (from > 0) from += before.indexOf(" ") + 1;
    let piece = entry.text.slice(from, from + 190);
    if (from + 190 < entry.text.length) piece = `${piece.slice(0, piece.lastIndexOf(" "))} …`;
    return (from > 0 && sentence < 0 ? "… " : "") + piece;
  }

  function marked(text, wanted, stem) {
    const line = document.createElement("p");
    let end = 0;
    for (const match of text.matchAll(/[\p{L}\p{N}\p{M}]+/gu)) {
      if (!wanted.has(stem(match[0]))) continue;
      line.append(text.slice(end, match.index));
      const mark = document.createElement("mark");
      mark.textContent = match[0];
      line.append(mark);
      end = match.index + match[0].length;
    }
    line.append(text.slice(end));
    return line;
  }

  function nothing(query, { index }) {
    const help = document.createElement("div");
    help.className = "lip-search-help";
    const line = document.createElement("p");
    line.textContent = `No section has “${query}”. Try fewer words, or another word for it; ` +
      "names are searched without their module. Or look here: ";
    const places = [["the glossary", "book/glossary.html"], ["the notation", "book/notation.html"],
      ["the library’s reference", "book/api/index.html"], ["all names", "genindex.html"]];
    places.forEach(([name, page], k) => {
      const link = document.createElement("a");
      link.href = ROOT + page;
      link.textContent = name;
      line.append(k ? ", " : "", link);
    });
    line.append(".");
    help.append(line);
    const [idea] = index.autoSuggest(query, { fuzzy: 0.3, prefix: true });
    if (idea) {
      const hint = document.createElement("p");
      const link = document.createElement("a");
      link.href = `${ROOT}search.html?q=${encodeURIComponent(idea.suggestion)}`;
      link.textContent = idea.suggestion;
      hint.append("Did you mean ", link, "?");
      help.append(hint);
    }
    return help;
  }

  async function show(query, target, limit) {
    const state = target.querySelector("[role=status]");
    const list = target.querySelector("ol");
    target.querySelector(".lip-search-help")?.remove();
    if (!query.trim()) {
      state.textContent = "";
      list.replaceChildren();
      return;
    }
    state.textContent = "Searching …";
    let found;
    try {
      found = await ready();
    } catch (error) {
      state.textContent = `The index could not be loaded (${error.message}).`;
      return;
    }
    if (target.dataset.query !== query) return; // typed on in the meantime
    const wanted = new Set(tokens(query).map(found.stem).filter(Boolean));
    const hits = find(found, query);
    list.replaceChildren(...hits.slice(0, limit).map((entry) => {
      const item = document.createElement("li");
      const link = document.createElement("a");
      link.href = ROOT + entry.url;
      link.textContent = entry.title;
      const where = document.createElement("span");
      where.className = "lip-search-where";
      where.textContent = entry.title === entry.page ? "" : entry.page;
      item.append(link, where, marked(excerpt(entry, wanted, found.stem), wanted, found.stem));
      return item;
    }));
    const count = hits.length;
    state.textContent = count ? `${count} ${count === 1 ? "section" : "sections"}` : "No section";
    if (!count) target.append(nothing(query, found));
  }

  function results(parent) {
    const box = document.createElement("div");
    box.className = "lip-search";
    box.innerHTML = '<p role="status"></p><ol></ol>';
    parent.append(box);
    return box;
  }

  function follow(input, box, limit) {
    let timer = 0;
    const ask = () => {
      box.dataset.query = input.value;
      show(input.value, box, limit);
    };
    input.addEventListener("focus", () => ready().catch(() => {}), { once: true });
    input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(ask, 120);
    });
    return ask;
  }

  document.addEventListener("DOMContentLoaded", () => {
    const page = document.getElementById("lip-search-page");
    const dialog = document.getElementById("pst-search-dialog");
    if (dialog) {
      const box = results(dialog);
      follow(dialog.querySelector("input"), box, SHOWN.dialog);
      // A link to a place in this very page closes the dialog.
      box.addEventListener("click", (event) => event.target.closest("a") && dialog.close());
    }
    if (page) {
      const input = page.querySelector("input");
      input.value = new URLSearchParams(location.search).get("q") || "";
      const ask = follow(input, results(page), SHOWN.page);
      page.querySelector("form").addEventListener("submit", (event) => {
        event.preventDefault();
        history.replaceState(null, "", `?q=${encodeURIComponent(input.value)}`);
        ask();
      });
      ask();
      input.focus();
    }
  });
})();
