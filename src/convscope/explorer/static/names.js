"use strict";
// Pages of named units: the table shows the rows that contain all words of the search; an example image finds others.
(() => {
  const input = document.getElementById("example");
  if (!input) return;
  input.addEventListener("change", async () => {
    const [file] = input.files;
    if (!file) return;
    showStatus("Uploading the image…");
    try {
      const { key } = await uploadImage(file);
      location.href = `/m/${encodeURIComponent(input.dataset.model)}/image/${key}/units`;
    } catch (error) {
      showStatus(`${file.name}: ${error.message}`);
    }
    input.value = "";  // so that the same file can be chosen again
  });
})();
(() => {
  const form = document.getElementById("search");
  if (!form) return;
  const input = form.elements.q, count = document.getElementById("count");
  const rows = [...document.querySelectorAll("#names tbody tr")].map((row) => ({ row, text: row.textContent.toLowerCase() }));

  function filter() {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let visible = 0;
    for (const { row, text } of rows) {
      row.hidden = !words.every((word) => text.includes(word));
      visible += !row.hidden;
    }
    count.textContent = words.length ? `${visible} of ${rows.length}` : "";
  }

  input.value = new URLSearchParams(location.search).get("q") || "";
  input.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
