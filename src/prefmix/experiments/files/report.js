(() => {
  "use strict";
  const root = document.documentElement;
  const all = (query, within = document) => [...within.querySelectorAll(query)];

  // Theme: as the system says, until somebody chooses.
  const button = document.querySelector(".theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  const label = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  const keep = (value) => { try { localStorage.setItem("prefmix-theme", value); } catch { /* files may have no storage */ } };
  try { const kept = localStorage.getItem("prefmix-theme"); if (kept) root.dataset.theme = kept; } catch { /* as above */ }
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; keep(root.dataset.theme); label(); });
  system.addEventListener("change", label);
  label();

  // Tooltips: by mouse or by touch.
  const tip = document.getElementById("tip");
  let shownAt = 0;
  const show = (event) => {
    const mark = event.target.closest && event.target.closest("[data-tip]");
    tip.classList.toggle("on", Boolean(mark));
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    shownAt = scrollY;
    const { width, height } = tip.getBoundingClientRect();
    const above = event.clientY - height - 14;
    tip.style.left = Math.max(8, Math.min(event.clientX - width / 2, innerWidth - width - 8)) + "px";
    tip.style.top = (above < 8 ? event.clientY + 18 : above) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  const away = () => { if (Math.abs(scrollY - shownAt) > 30) tip.classList.remove("on"); };
  document.addEventListener("scroll", away, { passive: true });

  // Tables of kind `sortable`: press a heading.
  const value = (row, column) => row.cells[column].textContent.trim();
  const numeric = (text) => parseFloat(text.replace(/[−–]/g, "-").replace(/,/g, ""));
  all("table.sortable").forEach((table) => all("th", table).forEach((head, column) => {
    const press = document.createElement("button");
    press.type = "button";
    press.textContent = head.textContent || "name";
    head.replaceChildren(press);
    press.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      all("th", table).forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = all("tbody tr", table).sort((a, b) => {
        const [x, y] = [numeric(value(a, column)), numeric(value(b, column))];
        if (column === 0) return value(a, 0).localeCompare(value(b, 0));
        return Number.isNaN(x) - Number.isNaN(y) || x - y;
      });
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  }));

  // One expert in all figures at once.
  const style = document.head.appendChild(document.createElement("style"));
  all(".chips button").forEach((chip) => chip.addEventListener("click", () => {
    const on = chip.getAttribute("aria-pressed") !== "true";
    all(".chips button").forEach((other) => other.setAttribute("aria-pressed", String(on && other === chip)));
    style.textContent = on ? `svg .e:not(.e${chip.dataset.expert}) { opacity: .13; }` : "";
  }));

  // Where the reader is.
  const links = new Map(all(".bar nav a").map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (!entry.isIntersecting) return;
    links.forEach((link, id) => link.classList.toggle("here", id === entry.target.id));
  }), { rootMargin: "-20% 0px -70% 0px" });
  all("section[id]").forEach((section) => seen.observe(section));
})();
