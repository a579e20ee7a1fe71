const PAGE = 24;
const form = document.querySelector(".filters");
const cards = [...document.querySelectorAll(".card")];
const more = document.querySelector(".more");
const holder = document.querySelector(".cards");
let limit = PAGE;

function show() {
  const value = (name) => form.elements[name].value;
  const wanted = cards.filter(({ dataset: card }) =>
    (!value("task") || card.task === value("task")) &&
    (!value("group") || card.group === value("group")) &&
    100 * card.score >= Number(value("low") || 0) && 100 * card.score <= Number(value("high") || 100));
  const visible = new Set(wanted.slice(0, limit));
  cards.forEach((card) => { card.hidden = !visible.has(card); });
  form.querySelector("output").textContent = `${visible.size} of ${wanted.length} shown`;
  more.hidden = visible.size === wanted.length;
  for (const layer of ["answer", "truth"]) {
    holder.classList.toggle(`no-${layer}`, !form.elements[layer].checked);
  }
}

form.addEventListener("input", () => { limit = PAGE; show(); });
form.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => { limit += PAGE; show(); });
show();
