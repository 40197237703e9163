// One service: which backend is out, and why.
import { useState } from "preact/hooks";
import { type Backend, type Detail, post } from "./api";
import { Sparks, State, levelOf } from "./parts";
import { ago, count, latency } from "./words";

const historySeconds = 15 * 60;

export function ServiceView({ name, detail, actions, now }: { name: string; detail: Detail | null; actions: boolean; now: number }) {
  if (!detail) return <p class="none">asking for {name}</p>;
  const s = detail.service;
  if (detail.error) return <p role="alert"><State level={2}>cannot be read</State> {detail.error}</p>;
  if (!s) return <p class="none">There is no service {name} in the kernel. <a href="#/">All services</a></p>;
  const places = Math.round(historySeconds / detail.everySeconds);
  const out = s.backends.filter((b) => !b.takes && b.state !== "standby");
  return (
    <section aria-label={"Service " + name}>
      <h1>{s.name}</h1>
      <p class="lead">
        {s.listeners.map((l) => <span class="listener"><State level={levelOf(l.verdict)}>{l.verdict === "refused" ? "refusing" : l.verdict}</State> <code>{l.listen}</code> {l.why && <em>{l.why}</em>}</span>)}
      </p>
      {s.listeners.length > 0 && <p>
        {detail.takes} of {count(detail.total, "backend")} {detail.takes === 1 ? "takes" : "take"} the next connection. Balance {s.balance}, from {s.source === "file" ? "the file" : s.source}
        {s.refused > 0 && <>; <b class="level2">{s.refused.toLocaleString("en")} connections were refused</b></>}.
      </p>}
      {out.length > 0 && <ul class="outs" aria-label="Backends that are out" aria-live="polite">
        {out.map((b) => <li><State level={levelOf(b.state)}>{b.state}</State> <code>{b.address}</code> {b.why ?? ""}{since(b, now)}</li>)}
      </ul>}
      <p class="links"><a href={"#/flows?service=" + encodeURIComponent(name)}>Live flows</a> <a href={"#/explain?to=" + encodeURIComponent(name)}>Explain</a></p>
      <div class="list backends" role="table" aria-label="Backends">
        <div class="row head" role="row">
          <span role="columnheader">State</span><span role="columnheader">Backend</span><span role="columnheader" class="n">In flight</span><span role="columnheader" class="n">Response</span>
          <span role="columnheader" class="n">Connections</span><span role="columnheader" class="n">Failed</span><span role="columnheader">In flight, response, failures: 15 minutes</span><span role="columnheader">Why, probe</span>
        </div>
        {s.backends.map((b) => <BackendRow key={b.address} service={name} b={b} lines={detail.history[b.address]} places={places} actions={actions} now={now} />)}
      </div>
      {detail.more > 0 && <p class="none">and {count(detail.more, "backend")} more: <code>pentad backend list --service {name}</code> shows all</p>}
      {s.packets && <><h2>Packets from elsewhere</h2><ul>{s.packets.map((p) => <li><code>{p.listen}</code> from {p.from.join(", ")}: {p.backends.length ? p.backends.join(", ") : "refused, there is no backend"}</li>)}</ul></>}
    </section>
  );
}

function since(b: Backend, now: number): string {
  return Date.parse(b.since) > 0 ? `; for ${ago(b.since, now)}` : "";
}

function BackendRow({ service, b, lines, places, actions, now }: {
  service: string; b: Backend; lines: Detail["history"][string] | undefined; places: number; actions: boolean; now: number;
}) {
  return (
    <div class="row" role="row">
      <span role="cell"><State level={levelOf(b.state)}>{b.state}</State></span>
      <span role="cell"><code>{b.address}</code><small>weight {b.weight}{b.group > 0 && `, group ${b.group}`}{b.zone && `, zone ${b.zone}`}</small></span>
      <span role="cell" class="n">{b.inFlight}</span>
      <span role="cell" class="n">{latency(b.responseSeconds ?? b.rttSeconds)}</span>
      <span role="cell" class="n">{b.connections.toLocaleString("en")}</span>
      <span role="cell" class={"n" + (b.failed > 0 ? " level1" : "")}>{b.failed.toLocaleString("en")}</span>
      <span role="cell" class="sparks"><Sparks lines={lines} places={places} /></span>
      <span role="cell" class="why">
        {b.why}{b.probe && <small>{b.probe.probe}: {b.probe.result === "none" ? "none has ended yet" : `${b.probe.result}${b.probe.last ? ` ${ago(b.probe.last, now)} ago` : ""}${b.probe.tookSeconds ? ` in ${latency(b.probe.tookSeconds)}` : ""}`}</small>}
        {actions && <Act service={service} b={b} />}
      </span>
    </div>
  );
}

/** Drains or enables. What the agent refuses is said, and can be forced. */
function Act({ service, b }: { service: string; b: Backend }) {
  const [said, setSaid] = useState("");
  const drained = b.state === "drained";
  const act = async (force: boolean) => {
    setSaid("…");
    try {
      await post("/v1/page/drain", { service, address: b.address, drained: !drained, force });
      setSaid("");
    } catch (e) {
      setSaid((e as Error).message);
    }
  };
  return (
    <span class="act">
      <button type="button" onClick={() => void act(false)}>{drained ? "Enable" : "Drain"} <span class="hidden">{b.address}</span></button>
      {said && <span role="alert">{said}{said.includes("--force") && <> <button type="button" onClick={() => void act(true)}>Drain all the same</button></>}</span>}
    </span>
  );
}
