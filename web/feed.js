// The one store of this page: the latest snapshot, fed by one EventSource.

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 15_000;
const SILENCE_MS = 40_000; // the node says something each 15 s; after this it is frozen or gone

/**
 * Keeps a stream open and calls `onChange({snapshot, state})` on every change, where state is
 * "connecting", "live" or "lost". The last snapshot stays while the stream is lost.
 */
export function follow(url, onChange) {
  const store = { snapshot: null, state: "connecting" };
  let source = null;
  let wait = FIRST_WAIT_MS;
  let watchdog = 0;

  function set(change) {
    Object.assign(store, change);
    onChange(store);
  }

  function heard() {
    clearTimeout(watchdog);
    watchdog = setTimeout(lost, SILENCE_MS);
  }

  function lost() {
    clearTimeout(watchdog);
    source.close(); // else the browser retries too, at its own pace
    set({ state: "lost" });
    setTimeout(open, wait * (0.75 + Math.random() / 2));
    wait = Math.min(wait * 2, LONGEST_WAIT_MS);
  }

  function open() {
    source = new EventSource(url);
    source.addEventListener("alive", heard);
    source.addEventListener("snapshot", (event) => {
      heard();
      wait = FIRST_WAIT_MS;
      set({ snapshot: JSON.parse(event.data), state: "live" });
    });
    source.addEventListener("error", lost);
    heard();
  }

  open();
}
