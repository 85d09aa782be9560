"use strict";
/* Choosing conditions, ordering rows, and a square for every episode. */
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), attributes);
  element.append(...children);
  return element;
};
document.querySelector(".tables").open = innerWidth > 736;
const form = document.querySelector(".choose");

function told(panel, condition, [seed, solved, steps, calls, pruned, target], tasks) {
  const dropped = condition.name === "none" ? "" : `, ${pruned} of which dropped tokens`;
  panel.replaceChildren(
    make("p", {}, make("b", { textContent: `Scene ${seed}, ${condition.label}` }), ` · ${tasks[target]}`),
    make("p", { textContent: `${solved ? "Solved" : "Not solved"} after ${steps} steps and ${calls} calls${dropped}.` }),
    make("p", { className: "soft" }, "No film was kept of it. This makes one: ",
      make("code", { textContent: `${data.watch} --conditions ${condition.name} --scenes ${seed}` })));
  panel.hidden = false;
}

all(".episodes").forEach((field) => {
  const { conditions, tasks } = data.groups[field.dataset.group];
  const panel = field.nextElementSibling;
  for (const condition of conditions) {
    const list = make("ol");
    for (const run of condition.runs) {
      const [seed, solved, steps, , , target, film] = run;
      const title = `scene ${seed}: ${tasks[target]}, ${solved ? "solved" : "not solved"} after ${steps} steps`;
      const square = film ? make("a", { href: film, title }) : make("button", { type: "button", title });
      square.className = solved ? "yes" : "";
      square.setAttribute("aria-label", title);
      if (!film) square.onclick = () => {
        all(".picked", field).forEach((other) => other.classList.remove("picked"));
        square.classList.add("picked");
        told(panel, condition, run, tasks);
      };
      list.append(make("li", {}, square));
    }
    const row = make("div", {}, make("h4", { textContent: condition.label }), list);
    if (condition.name !== "none") Object.assign(row.dataset, { budget: condition.budget, method: condition.method });
    field.append(row);
  }
});

function apply() {
  const chosen = (name) => new Set(all(`input[name=${name}]:checked`, form).map((input) => input.value));
  const budgets = chosen("budget"), methods = chosen("method");
  all("tbody.budget").forEach((body) => {
    if (body.dataset.budget === "all") return;
    const rows = all("tr.row", body);
    rows.forEach((row) => { row.hidden = !methods.has(row.dataset.method); });
    body.hidden = !budgets.has(body.dataset.budget) || rows.every((row) => row.hidden);
    const [order] = chosen("order"), sign = order === "order" ? 1 : -1;
    rows.sort((a, b) => sign * (a.dataset[order] - b.dataset[order]) || a.dataset.order - b.dataset.order);
    body.append(...rows);
  });
  all(".episodes > div[data-method]").forEach((row) => {
    row.hidden = !methods.has(row.dataset.method) || !budgets.has(row.dataset.budget);
  });
  all("[data-series]").forEach((part) => { part.style.display = methods.has(part.dataset.series) ? "" : "none"; });
}

if (form) {
  form.onchange = apply;
  all("[data-every]", form).forEach((button) => {
    button.onclick = () => {
      const boxes = all(`input[name=${button.dataset.every}]`, form), on = !boxes.every((box) => box.checked);
      boxes.forEach((box) => { box.checked = on; });
      apply();
    };
  });
  form.onsubmit = (event) => event.preventDefault();
  apply();
}
