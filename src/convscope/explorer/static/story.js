"use strict";
// The story, told while one waits.
(() => {
  const tell = document.getElementById("tell");
  if (!tell) return;
  const progress = document.getElementById("progress");
  let source = null;
  tell.addEventListener("click", () => {
    tell.disabled = true;
    progress.hidden = false;
    source = follow(page.events, {
      onProgress: showProgress,
      onDone: () => location.reload(),
      onError: (reason) => { say(reason); tell.disabled = false; progress.hidden = true; },
    });
  });
  document.getElementById("cancel").addEventListener("click", () => { source.close(); tell.disabled = false; progress.hidden = true; });
})();
