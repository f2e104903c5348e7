"use strict";
// Story page: generates the story while the page is open.
(() => {
  const generate = document.getElementById("generate");
  if (!generate) return;
  const progress = document.getElementById("progress");
  let source = null;
  function stop() {
    source.close();
    generate.disabled = false;
    progress.hidden = true;
  }
  generate.addEventListener("click", () => {
    generate.disabled = true;
    progress.hidden = false;
    source = followJob(page.events, {
      onProgress: showProgress,
      onDone: () => location.reload(),
      onError: (reason) => { showStatus(reason); stop(); },
    });
  });
  document.getElementById("cancel").addEventListener("click", stop);
})();
