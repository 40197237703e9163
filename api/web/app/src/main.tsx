// The page of one host.
import { render } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { type Detail, type Head, type Look, type Row, NeedsToken, follow, token, tokenNeeded } from "./api";
import { Explain } from "./explain";
import { FlowsView } from "./flows";
import { PartsView } from "./roles";
import { ServiceView } from "./service";
import { Services } from "./services";
import { State, useNow } from "./parts";

interface Model {
  head: Head | null;
  heard: number; // when, by the clock of this browser
  rows: Map<string, Row>;
  detail: Detail | null;
  actions: boolean;
}

/** Where the page is: the part of the address behind #. */
function usePlace(): { view: string; name: string; query: URLSearchParams } {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const changed = () => setHash(location.hash);
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  const [path, query] = hash.replace(/^#\/?/, "").split("?");
  const [view, ...name] = path.split("/");
  return { view: view || "services", name: decoded(name.join("/")), query: new URLSearchParams(query) };
}

function decoded(text: string): string {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // somebody has typed it
  }
}

function Page() {
  const place = usePlace();
  const [model, setModel] = useState<Model>({ head: null, heard: 0, rows: new Map(), detail: null, actions: false });
  const [error, setError] = useState<Error | null>(null);
  const [tries, setTries] = useState(0);
  const service = place.view === "service" ? place.name : "";
  const now = useNow();

  useEffect(() => {
    const stop = new AbortController();
    const on = (event: string, data: any) =>
      setModel((m) => {
        if (event === "hello") return { ...m, actions: data.actions };
        if (event === "service") return { ...m, detail: data };
        const look = data as Look;
        const rows = look.whole ? new Map<string, Row>() : new Map(m.rows);
        for (const r of look.rows) rows.set(r.service, r);
        for (const name of look.gone) rows.delete(name);
        return { ...m, head: look.head, heard: Date.now(), rows };
      });
    void follow("/v1/page/stream?service=" + encodeURIComponent(service), stop.signal, on, setError);
    return () => stop.abort();
  }, [service, tries]);

  useEffect(() => {
    const needed = () => setError(new NeedsToken());
    addEventListener(tokenNeeded, needed);
    return () => removeEventListener(tokenNeeded, needed);
  }, []);

  const title = useRef("");
  const { head } = model;
  const bad = head ? head.problems.length + head.refusing + (head.error ? 1 : 0) : 0;
  const wanted = `${bad > 0 ? `(${bad}) ` : ""}${service || (head ? head.host : "")} · pentad`;
  if (title.current !== wanted) document.title = title.current = wanted;
  const rows = useMemo(() => [...model.rows.values()], [model.rows]);

  if (error instanceof NeedsToken) return <AskToken said={() => { setError(null); setTries(tries + 1); }} />;
  return (
    <>
      <header class="top">
        <a class="brand" href="#/">pentad</a>
        <span class="host">{head?.host}</span>
        <Health head={head} error={error} old={now - model.heard} />
        <nav aria-label="Views">
          {[["services", "Services"], ["flows", "Flows"], ["explain", "Explain"], ["roles", "Roles"]].map(([view, text]) => (
            <a href={"#/" + view} aria-current={place.view === view || (view === "services" && place.view === "service") ? "page" : undefined}>{text}</a>
          ))}
        </nav>
      </header>
      <main>
        {head && <Problems head={head} />}
        {place.view === "flows" ? <FlowsView key={place.query.toString()} query={place.query} />
          : place.view === "explain" ? <Explain query={place.query} />
          : place.view === "roles" ? <PartsView />
          : place.view === "service" ? <ServiceView name={service} detail={model.detail?.name === service ? model.detail : null} actions={model.actions} now={now} />
          : <Services rows={rows} head={head} />}
      </main>
    </>
  );
}

function Health({ head, error, old }: { head: Head | null; error: Error | null; old: number }) {
  const late = head !== null && old > Math.max(5000, head.everySeconds * 4000);
  const age = `${Math.max(0, Math.round(old / 1000))} s`;
  if (error) return <span class="pill level2" role="status">✕ no answer: what you see is {head ? age + " old" : "nothing yet"}</span>;
  if (!head) return <span class="pill" role="status">asking the host</span>;
  if (late) return <span class="pill level1" role="status">▲ what you see is {age} old</span>;
  if (head.error) return <span class="pill level2" role="status">✕ the kernel cannot be read</span>;
  if (head.problems.length > 0) return <span class="pill level2" role="status">✕ {head.problems.length === 1 ? "1 problem" : head.problems.length + " problems"}</span>;
  if (head.refusing > 0) return <span class="pill level2" role="status">✕ {head.refusing} of {head.listeners} listeners refuse</span>;
  if (!head.healthy) return <span class="pill level2" role="status">✕ not well</span>;
  return <span class="pill level0" role="status">✓ well</span>;
}

function Problems({ head }: { head: Head }) {
  return (
    <section class="problems" aria-label="Problems" aria-live="polite">
      {head.error && <p class="level2"><State level={2}>cannot be read</State> {head.error}</p>}
      {head.problems.map((p) => <p class="level2"><State level={2}>problem</State> {p}</p>)}
      {head.warnings.map((p) => <p class="level1"><State level={1}>warning</State> {p}</p>)}
    </section>
  );
}

function AskToken({ said }: { said: () => void }) {
  const [value, setValue] = useState("");
  const [odd, setOdd] = useState(false);
  return (
    <form class="token" onSubmit={(e) => { e.preventDefault(); if (token.possible(value.trim())) { token.set(value.trim()); said(); } else setOdd(true); }}>
      <h1>pentad</h1>
      <p>{odd ? "A token has letters, digits and signs of ASCII only." : token.get() ? "That is not the token." : "This host asks for the token."} It stands in the file that <code>api.tokenFile</code> names.</p>
      <label>Token <input type="password" autoFocus autocomplete="off" value={value} onInput={(e) => setValue(e.currentTarget.value)} /></label>
      <button type="submit">Look</button>
    </form>
  );
}

const root = document.getElementById("page")!;
root.replaceChildren();
render(<Page />, root);
